"""What tools/lazyconfig_train_net.py reads beside model, data, optimizer and schedule."""

train = dict(
    output_dir="output/lazy",
    # torchvision's ImageNet weights, with their RGB normalization and the stride in the 3x3
    init_checkpoint="detectron2://ImageNetPretrained/torchvision/R-50.pkl",
    max_iter=87960,
    seed=-1,  # a negative one makes every training another one
    device="cuda",
    channels_last=False,  # keep weights and feature maps in the channels_last memory format
    cudnn_benchmark=False,
    amp=dict(enabled=False),  # mixed precision
    ddp=dict(  # options of DistributedDataParallel
        broadcast_buffers=False,
        find_unused_parameters=False,
        fp16_compression=False,
    ),
    checkpointer=dict(period=5000),  # options of PeriodicCheckpointer
    eval_period=0,  # iterations; 0 evaluates only after the last one
    log_period=20,
)
