// Vector registers of the instruction set that is being compiled: CARAFE_VECTOR_BYTES is their
// width. Written with GCC's vector extensions, so that one text serves all sets.
//
// Everything has internal linkage, and no template of the standard library is used: code that was
// compiled for AVX-512 must never be linked into the plain build.
#pragma once

#include <cstddef>
#include <cstdint>
#include <math.h>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "../half.h"

#define CARAFE_INLINE inline __attribute__((always_inline))
// Before loops over registers: an array that is indexed by a variable would live in memory.
#define CARAFE_UNROLL _Pragma("GCC unroll 64")

namespace carafe_d2 {
namespace {

template <typename A>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vector __attribute__((vector_size(CARAFE_VECTOR_BYTES)));
  typedef int32_t Integers __attribute__((vector_size(CARAFE_VECTOR_BYTES)));
};

template <>
struct Simd<double> {
  typedef double Vector __attribute__((vector_size(CARAFE_VECTOR_BYTES)));
  typedef int64_t Integers __attribute__((vector_size(CARAFE_VECTOR_BYTES)));
};

template <typename A>
using Vector = typename Simd<A>::Vector;

template <typename A>
constexpr int64_t kLanes = CARAFE_VECTOR_BYTES / sizeof(A);

template <typename A>
int64_t whole_vectors(int64_t n) {
  return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// ------------------------------------------------------------------------- memory and registers

CARAFE_INLINE Vector<double> load(const double* source) {
  Vector<double> vector;
  __builtin_memcpy(&vector, source, sizeof(vector));
  return vector;
}

CARAFE_INLINE Vector<float> load(const float* source) {
  Vector<float> vector;
  __builtin_memcpy(&vector, source, sizeof(vector));
  return vector;
}

CARAFE_INLINE void store(double* target, Vector<double> vector) {
  __builtin_memcpy(target, &vector, sizeof(vector));
}

CARAFE_INLINE void store(float* target, Vector<float> vector) {
  __builtin_memcpy(target, &vector, sizeof(vector));
}

// A store past the caches, to an address aligned to a vector, where a vector is a whole cache line:
// parts of lines would reach the memory one by one. `finish_streaming` has to follow before another
// thread reads.
CARAFE_INLINE void stream(float* target, Vector<float> vector) {
#if CARAFE_VECTOR_BYTES == 64
  _mm512_stream_ps(target, vector);
#else
  store(target, vector);
#endif
}

CARAFE_INLINE void finish_streaming() {
#ifdef __x86_64__
  _mm_sfence();
#endif
}

typedef uint16_t HalfBits __attribute__((vector_size(CARAFE_VECTOR_BYTES / 2)));
typedef uint32_t FloatBits __attribute__((vector_size(CARAFE_VECTOR_BYTES)));

CARAFE_INLINE Vector<float> load(const BFloat16* source) {
  HalfBits bits;
  __builtin_memcpy(&bits, source, sizeof(bits));
  return (Vector<float>)(__builtin_convertvector(bits, FloatBits) << 16);
}

CARAFE_INLINE void store(BFloat16* target, Vector<float> vector) {
  const FloatBits bits = (FloatBits)vector;
  const FloatBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even
  const FloatBits is_nan = (FloatBits)(vector != vector);
  const HalfBits result =
      __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), HalfBits);
  __builtin_memcpy(target, &result, sizeof(result));
}

CARAFE_INLINE Vector<float> load(const Half* source) {
#if CARAFE_VECTOR_BYTES == 64
  return _mm512_maskz_cvtph_ps(-1, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif CARAFE_VECTOR_BYTES == 32
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
  Vector<float> vector;
  for (int64_t lane = 0; lane < kLanes<float>; ++lane) vector[lane] = to_float(source[lane]);
  return vector;
#endif
}

CARAFE_INLINE void store(Half* target, Vector<float> vector) {
#if CARAFE_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_maskz_cvtps_ph(-1, vector, 0));
#elif CARAFE_VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph(vector, 0));
#else
  for (int64_t lane = 0; lane < kLanes<float>; ++lane) from_float(vector[lane], target[lane]);
#endif
}

// Copies n < 2 * Size elements in two moves of a fixed size that may overlap.
template <int64_t Size, typename T>
CARAFE_INLINE void copy_few(T* target, const T* source, int64_t n) {
  if (n >= Size) {
    __builtin_memcpy(target, source, Size * sizeof(T));
    __builtin_memcpy(target + n - Size, source + n - Size, Size * sizeof(T));
  } else if constexpr (Size > 1) {
    copy_few<Size / 2>(target, source, n);
  }
}

// The first n lanes, n less than all; the others are zero.
template <typename A, typename T>
CARAFE_INLINE Vector<A> load_few(const T* source, int64_t n) {
#if CARAFE_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps((1u << n) - 1, source);
#endif
  T copy[kLanes<A>] = {};
  copy_few<kLanes<A> / 2>(copy, source, n);
  return load(copy);
}

template <typename A, typename T>
CARAFE_INLINE void store_few(T* target, Vector<A> vector, int64_t n) {
#if CARAFE_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(target, (1u << n) - 1, vector);
#endif
  T copy[kLanes<A>];
  store(copy, vector);
  copy_few<kLanes<A> / 2>(target, copy, n);
}

// -------------------------------------------------------------------------------- transposition

// Seen as a 2 x 2 matrix of blocks of Size lanes each, (a, b) becomes its transpose.
template <int64_t Size, typename A>
CARAFE_INLINE void exchange(Vector<A>& a, Vector<A>& b) {
  typename Simd<A>::Integers first, second;
  CARAFE_UNROLL
  for (int64_t lane = 0; lane < kLanes<A>; ++lane) {
    const bool right = lane / Size % 2;
    first[lane] = right ? kLanes<A> + lane - Size : lane;
    second[lane] = right ? kLanes<A> + lane : lane + Size;
  }
#ifdef __clang__
  const Vector<A> both[2] = {a, b};
  for (int64_t lane = 0; lane < kLanes<A>; ++lane) {
    a[lane] = both[first[lane] / kLanes<A>][first[lane] % kLanes<A>];
    b[lane] = both[second[lane] / kLanes<A>][second[lane] % kLanes<A>];
  }
#else
  const Vector<A> old_a = a;
  a = __builtin_shuffle(old_a, b, first);
  b = __builtin_shuffle(old_a, b, second);
#endif
}

// Transposes a square matrix of registers.
template <typename A, int64_t Size = 1>
CARAFE_INLINE void transpose(Vector<A> (&rows)[kLanes<A>]) {
  if constexpr (Size < kLanes<A>) {
    CARAFE_UNROLL
    for (int64_t i = 0; i < kLanes<A>; ++i) {
      if (i / Size % 2 == 0) exchange<Size, A>(rows[i], rows[i + Size]);
    }
    transpose<A, 2 * Size>(rows);
  }
}

// Lane i of the result is the sum of all lanes of vectors[i], for Count <= kLanes vectors.
template <typename A, int64_t Count, int64_t Size = 1>
CARAFE_INLINE Vector<A> sum_lanes(Vector<A> (&vectors)[Count]) {
  if constexpr (Size == kLanes<A>) {
    return vectors[0];
  } else {
    Vector<A> halved[(Count + 1) / 2];
    CARAFE_UNROLL
    for (int64_t i = 0; i < (Count + 1) / 2; ++i) {
      Vector<A> a = vectors[2 * i], b = vectors[2 * i + 1 < Count ? 2 * i + 1 : 2 * i];
      exchange<Size, A>(a, b);
      halved[i] = a + b;
    }
    return sum_lanes<A, (Count + 1) / 2, 2 * Size>(halved);
  }
}

// ---------------------------------------------------------------------------------- exponential

// exp(x) for x <= 0; results below the normal range become zero. Error below 2 units in the last
// place. -inf gives 0, NaN gives NaN.
CARAFE_INLINE Vector<float> exp_nonpositive(Vector<float> x) {
  constexpr float kLowest = -87.336544f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low bits
  const Vector<float> zero = {};
  const Vector<float> clamped = x < kLowest ? zero + kLowest : x;
  const Vector<float> shifted = clamped * 1.44269504f + kRound;
  const Vector<float> n = shifted - kRound;
  const Vector<float> f = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector<float> poly = f * 1.9875691500e-4f + 1.3981999507e-3f;
  poly = poly * f + 8.3334519073e-3f;
  poly = poly * f + 4.1665795894e-2f;
  poly = poly * f + 1.6666665459e-1f;
  poly = poly * f + 5.0000001201e-1f;
  poly = poly * f * f + f + 1.0f;
  const Vector<float> power = (Vector<float>)(((FloatBits)shifted << 23) + 0x3f800000u);
  return x < kLowest ? zero : poly * power;
}

CARAFE_INLINE Vector<double> exp_nonpositive(Vector<double> x) {
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) x[lane] = exp(x[lane]);
  return x;
}

}  // namespace
}  // namespace carafe_d2
