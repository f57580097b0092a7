// Storage types float16 and bfloat16, and their conversion from and to float.
//
// Everything is `static`: this header is compiled for several instruction sets, and none of the
// copies may replace another at link time. The host versions are free of branches, so that loops
// over them vectorize.
#pragma once

#include <cstdint>

#include "carafe.h"
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace carafe_d2 {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

static CARAFE_HOST_DEVICE float float_from_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

static CARAFE_HOST_DEVICE uint32_t bits_from_float(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

static CARAFE_HOST_DEVICE float to_float(float value) { return value; }
static CARAFE_HOST_DEVICE double to_float(double value) { return value; }

static CARAFE_HOST_DEVICE float to_float(BFloat16 value) {
  return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}

static CARAFE_HOST_DEVICE float to_float(Half value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  // The exponent is rebiased by a multiplication with 2^112, which also normalizes subnormals.
  const float scaled = float_from_bits(magnitude << 13) * float_from_bits(0x77800000u);
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;  // infinity or NaN
  return float_from_bits(bits_from_float(scaled) | special | sign);
#endif
}

static CARAFE_HOST_DEVICE void from_float(float value, float& result) { result = value; }
static CARAFE_HOST_DEVICE void from_float(double value, double& result) { result = value; }

static CARAFE_HOST_DEVICE void from_float(float value, BFloat16& result) {
#ifdef __CUDA_ARCH__
  result.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const uint32_t bits = bits_from_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
  result.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
#endif
}

static CARAFE_HOST_DEVICE void from_float(float value, Half& result) {
#ifdef __CUDA_ARCH__
  result.bits = __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = bits_from_float(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Rounding to nearest even: for normal numbers on the bits, for subnormal ones by the addition.
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN or infinity
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t half = magnitude >= 0x47800000u ? special : finite;
  result.bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
#endif
}

}  // namespace carafe_d2
