#!/usr/bin/env python3
"""Trains and evaluates detectors with CARAFE; carafe_d2/train_net.py is the program itself."""

from carafe_d2.train_net import run

if __name__ == "__main__":
    run()
