// The CPU kernels, written once for all instruction sets: CARAFE_VECTOR_BYTES is the width of a
// vector register and CARAFE_CPU_KERNELS the name of the table that this compilation defines.
//
// Everything but that table has internal linkage, and no template of the standard library is used:
// code that was compiled for AVX-512 must never be linked into the plain build.
//
// All kernels work row by row of the source map. The reassembly kernels of a row are held in a
// buffer `weights[p][t][w]` of the accumulation type. Only the functions that fill it and take a
// gradient from it (`load_weights`, `store_weight_gradients`) know whether masks or logits are
// in memory, which layout they have and whether there is a softmax. Rows in buffers start at
// column -r and are padded with zeros to whole vectors, so that the inner loops know neither
// borders nor remainders.
#include <math.h>

#include <cstddef>
#include <cstdint>

#include "../half.h"
#include "kernels.h"

namespace carafe_d2 {
namespace {

template <typename A>
struct Simd {
  static constexpr int64_t kLanes = CARAFE_VECTOR_BYTES / sizeof(A);
  typedef A Vector __attribute__((vector_size(CARAFE_VECTOR_BYTES)));

  static Vector load(const A* source) {
    Vector vector;
    __builtin_memcpy(&vector, source, sizeof(vector));
    return vector;
  }

  static void store(A* target, Vector vector) {
    __builtin_memcpy(target, &vector, sizeof(vector));
  }

  static A sum(Vector vector) {
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < half; ++lane) vector[lane] += vector[lane + half];
    }
    return vector[0];
  }
};

template <typename A>
int64_t whole_vectors(int64_t n) {
  return (n + Simd<A>::kLanes - 1) / Simd<A>::kLanes * Simd<A>::kLanes;
}

// Hands out pieces of the scratch memory; without memory it only counts.
class Arena {
 public:
  explicit Arena(char* memory) : memory_(memory) {}

  template <typename A>
  A* take(int64_t count) {
    const size_t offset = used_;
    used_ += (static_cast<size_t>(count) * sizeof(A) + 63) / 64 * 64;
    return memory_ ? reinterpret_cast<A*>(memory_ + offset) : nullptr;
  }

  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

// ------------------------------------------------- between tensors and the accumulation type

template <typename Body>
void with_type(float, Type type, void* data, const Body& body) {
  switch (type) {
    case Type::kHalf: return body(static_cast<Half*>(data));
    case Type::kBFloat16: return body(static_cast<BFloat16*>(data));
    default: return body(static_cast<float*>(data));
  }
}

template <typename Body>
void with_type(double, Type, void* data, const Body& body) {
  body(static_cast<double*>(data));
}

template <typename A>
void load(A* __restrict target, Type type, void* data, int64_t offset, int64_t stride, int64_t n) {
  with_type(A(), type, data, [&](auto* base) {
    const auto* __restrict source = base + offset;
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) target[i] = to_float(source[i]);
    } else if (stride == 2) {
      for (int64_t i = 0; i < n; ++i) target[i] = to_float(source[2 * i]);
    } else {
      for (int64_t i = 0; i < n; ++i) target[i] = to_float(source[i * stride]);
    }
  });
}

template <typename A>
void store(const A* __restrict source, Type type, void* data, int64_t offset, int64_t stride,
           int64_t n) {
  with_type(A(), type, data, [&](auto* base) {
    auto* __restrict target = base + offset;
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) from_float(source[i], target[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) from_float(source[i], target[i * stride]);
    }
  });
}

// Stores `count` rows, `row_size` apart in `source`, as every count-th element of one row.
template <typename A>
void store_interleaved(const A* __restrict source, int64_t row_size, int64_t count, Type type,
                       void* data, int64_t offset, int64_t n) {
  with_type(A(), type, data, [&](auto* base) {
    auto* __restrict target = base + offset;
    if (count == 2) {
      const A* __restrict even = source;
      const A* __restrict odd = source + row_size;
      for (int64_t i = 0; i < n; ++i) {
        from_float(even[i], target[2 * i]);
        from_float(odd[i], target[2 * i + 1]);
      }
    } else {
      for (int64_t row = 0; row < count; ++row) {
        for (int64_t i = 0; i < n; ++i) {
          from_float(source[row * row_size + i], target[i * count + row]);
        }
      }
    }
  });
}

// ------------------------------------------------------------------------- reassembly kernels

// exp(x) for x <= 0, in a form that vectorises; results below the normal range become zero.
// Error below 2 units in the last place. -inf gives 0, NaN gives NaN.
inline float exp_nonpositive(float x) {
  constexpr float kLowest = -87.336544f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low bits
  const float clamped = x < kLowest ? kLowest : x;
  const float shifted = clamped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float f = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float poly = 1.9875691500e-4f;
  poly = poly * f + 1.3981999507e-3f;
  poly = poly * f + 8.3334519073e-3f;
  poly = poly * f + 4.1665795894e-2f;
  poly = poly * f + 1.6666665459e-1f;
  poly = poly * f + 5.0000001201e-1f;
  poly = poly * f * f + f + 1.0f;
  const float power = float_from_bits((bits_from_float(shifted) << 23) + 0x3f800000u);
  return x < kLowest ? 0.0f : poly * power;
}

inline double exp_nonpositive(double x) { return exp(x); }

// Buffer weights[p][t][w] of one source row.
template <typename A>
struct Weights {
  int64_t subpixels, taps, width, radius;
  int64_t row_size;  // of weights[p][t]
  A* data;

  Weights(const Shape& shape, Arena& arena)
      : subpixels(shape.subpixels()),
        taps(shape.taps()),
        width(shape.width),
        radius(shape.radius()),
        row_size(whole_vectors<A>(width) + 2 * radius),
        data(arena.take<A>(subpixels * taps * row_size)) {}

  A* padded(int64_t p, int64_t t) const { return data + (p * taps + t) * row_size; }
  A* at(int64_t p, int64_t t) const { return padded(p, t) + radius; }
};

inline int64_t offset_of(const Shape& shape, const Kernels& kernels, int64_t n, int64_t g,
                         int64_t h, int64_t p, int64_t t) {
  return n * kernels.batch + g * kernels.group + t * kernels.tap + h * kernels.row +
         p / shape.scale * kernels.sub_row + p % shape.scale * kernels.sub_column;
}

template <typename A>
void softmax(const Weights<A>& weights, int64_t p, A* __restrict largest, A* __restrict sum) {
  const int64_t width = weights.width;
  for (int64_t w = 0; w < width; ++w) largest[w] = weights.at(p, 0)[w], sum[w] = 0;
  for (int64_t t = 1; t < weights.taps; ++t) {
    const A* __restrict row = weights.at(p, t);
    for (int64_t w = 0; w < width; ++w) largest[w] = row[w] > largest[w] ? row[w] : largest[w];
  }
  for (int64_t t = 0; t < weights.taps; ++t) {
    A* __restrict row = weights.at(p, t);
    for (int64_t w = 0; w < width; ++w) {
      row[w] = exp_nonpositive(row[w] - largest[w]);
      sum[w] += row[w];
    }
  }
  for (int64_t w = 0; w < width; ++w) sum[w] = 1 / sum[w];
  for (int64_t t = 0; t < weights.taps; ++t) {
    A* __restrict row = weights.at(p, t);
    for (int64_t w = 0; w < width; ++w) row[w] *= sum[w];
  }
}

// `line` is room for two rows of weights.
template <typename A>
void load_weights(const Shape& shape, const Kernels& kernels, int64_t n, int64_t g, int64_t h,
                  const Weights<A>& weights, A* line) {
  for (int64_t p = 0; p < weights.subpixels; ++p) {
    for (int64_t t = 0; t < weights.taps; ++t) {
      load(weights.at(p, t), kernels.type, kernels.data, offset_of(shape, kernels, n, g, h, p, t),
           kernels.column, weights.width);
    }
    if (kernels.softmax) softmax(weights, p, line, line + weights.row_size);
  }
}

// With m = softmax(logits): grad logits[t] = m[t] * (grad m[t] - sum over t' of m[t'] * grad
// m[t']).
template <typename A>
void softmax_backward(const Weights<A>& weights, const Weights<A>& grad, int64_t p,
                      A* __restrict sum) {
  const int64_t width = weights.width;
  for (int64_t w = 0; w < width; ++w) sum[w] = 0;
  for (int64_t t = 0; t < weights.taps; ++t) {
    const A* __restrict row = weights.at(p, t);
    const A* __restrict grad_row = grad.at(p, t);
    for (int64_t w = 0; w < width; ++w) sum[w] += row[w] * grad_row[w];
  }
  for (int64_t t = 0; t < weights.taps; ++t) {
    const A* __restrict row = weights.at(p, t);
    A* __restrict grad_row = grad.at(p, t);
    for (int64_t w = 0; w < width; ++w) grad_row[w] = row[w] * (grad_row[w] - sum[w]);
  }
}

template <typename A>
void store_weight_gradients(const Shape& shape, const Kernels& kernels, int64_t n, int64_t g,
                            int64_t h, const Weights<A>& weights, const Weights<A>& grad, A* line) {
  for (int64_t p = 0; p < grad.subpixels; ++p) {
    if (kernels.softmax) softmax_backward(weights, grad, p, line);
    for (int64_t t = 0; t < grad.taps; ++t) {
      store(grad.at(p, t), kernels.type, kernels.data, offset_of(shape, kernels, n, g, h, p, t),
            kernels.column, grad.width);
    }
  }
}

// ------------------------------------------------------------------------- blocks of registers

// Calls body(integral constant, first) for blocks that cover [0, count): of Size while they fit,
// then of one.
template <int64_t N>
struct Block {
  static constexpr int64_t kSize = N;
};

template <int64_t Size, typename Body>
void for_blocks(int64_t count, const Body& body) {
  int64_t first = 0;
  for (; first + Size <= count; first += Size) body(Block<Size>(), first);
  for (; first < count; ++first) body(Block<1>(), first);
}

// Calls body(Block) with the kernel size where it is a usual one, and with Block<1> otherwise.
template <typename Body>
void with_kernel_rows(int64_t kernel, const Body& body) {
  switch (kernel) {
    case 3: return body(Block<3>());
    case 5: return body(Block<5>());
    case 7: return body(Block<7>());
    default: return body(Block<1>());
  }
}

// ------------------------------------------------------------------------- contiguous features

constexpr int64_t kChannelBlock = 8;  // channels that are in buffers at a time

// Buffer rows[c][u][w] of a block of channels: the features at rows h - r to h + r.
template <typename A>
struct FeatureRows {
  int64_t kernel, height, width, radius, row_size;
  A* data;

  FeatureRows(const Shape& shape, Arena& arena)
      : kernel(shape.kernel),
        height(shape.height),
        width(shape.width),
        radius(shape.radius()),
        row_size(whole_vectors<A>(width) + 2 * radius),
        data(arena.take<A>(kChannelBlock * kernel * row_size)) {}

  A* padded(int64_t c, int64_t u) const { return data + (c * kernel + u) * row_size; }

  void load_channel(int64_t c, const Map& features, int64_t offset, int64_t h) const {
    for (int64_t u = 0; u < kernel; ++u) {
      A* row = padded(c, u) + radius;
      const int64_t y = h + u - radius;
      if (y >= 0 && y < height) {
        load(row, features.type, features.data, offset + y * features.row, 1, width);
      } else {
        for (int64_t w = 0; w < width; ++w) row[w] = 0;
      }
    }
  }
};

// Buffer rows[c][p][w] of a block of channels: output or its gradient for one source row.
template <typename A>
struct OutputRows {
  int64_t scale, width, radius, row_size;
  A* data;

  OutputRows(const Shape& shape, Arena& arena)
      : scale(shape.scale),
        width(shape.width),
        radius(shape.radius()),
        row_size(whole_vectors<A>(width) + 2 * radius),
        data(arena.take<A>(kChannelBlock * shape.subpixels() * row_size)) {}

  A* padded(int64_t c, int64_t p) const { return data + (c * scale * scale + p) * row_size; }
  A* at(int64_t c, int64_t p) const { return padded(c, p) + radius; }

  void load_channel(int64_t c, const Map& map, int64_t offset, int64_t h) const {
    for (int64_t p = 0; p < scale * scale; ++p) {
      load(at(c, p), map.type, map.data,
           offset + (h * scale + p / scale) * map.row + p % scale, scale, width);
    }
  }

  void store_channel(int64_t c, const Map& map, int64_t offset, int64_t h) const {
    for (int64_t dy = 0; dy < scale; ++dy) {
      store_interleaved(at(c, dy * scale), row_size, scale, map.type, map.data,
                        offset + (h * scale + dy) * map.row, width);
    }
  }
};

// out[c][p][w] = sum over t of weights[p][t][w] * rows[c][u][w + v], C channels and P subpixels.
template <int64_t C, int64_t P, typename A>
void reassemble_rows(const Weights<A>& weights, const FeatureRows<A>& rows,
                     const OutputRows<A>& out, int64_t c0, int64_t p0) {
  using S = Simd<A>;
  for (int64_t w = 0; w < weights.width; w += S::kLanes) {
    typename S::Vector sum[C][P] = {};
    for (int64_t u = 0; u < rows.kernel; ++u) {
      for (int64_t v = 0; v < rows.kernel; ++v) {
        typename S::Vector x[C];
        for (int64_t c = 0; c < C; ++c) x[c] = S::load(rows.padded(c0 + c, u) + w + v);
        for (int64_t p = 0; p < P; ++p) {
          const auto weight = S::load(weights.at(p0 + p, u * rows.kernel + v) + w);
          for (int64_t c = 0; c < C; ++c) sum[c][p] += weight * x[c];
        }
      }
    }
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t p = 0; p < P; ++p) S::store(out.at(c0 + c, p0 + p) + w, sum[c][p]);
    }
  }
}

template <typename A>
size_t forward_contiguous(const Shape& shape, const Map& features, const Kernels& kernels,
                          const Map& output, int64_t begin, int64_t end, char* scratch) {
  Arena arena(scratch);
  const Weights<A> weights(shape, arena);
  const FeatureRows<A> rows(shape, arena);
  const OutputRows<A> out(shape, arena);
  A* line = arena.take<A>(2 * weights.row_size);
  if (!scratch) return arena.used();

  for (int64_t index = begin; index < end; ++index) {
    const int64_t h = index % shape.height;
    const int64_t g = index / shape.height % shape.groups;
    const int64_t n = index / shape.height / shape.groups;
    load_weights(shape, kernels, n, g, h, weights, line);
    for (int64_t first = 0; first < shape.group_channels(); first += kChannelBlock) {
      const int64_t left = shape.group_channels() - first;
      const int64_t count = left < kChannelBlock ? left : kChannelBlock;
      const int64_t channel = g * shape.group_channels() + first;
      for (int64_t c = 0; c < count; ++c) {
        rows.load_channel(c, features, n * features.batch + (channel + c) * features.channel, h);
      }
      for_blocks<2>(count, [&](auto channels, int64_t c) {
        for_blocks<4>(shape.subpixels(), [&](auto pixels, int64_t p) {
          reassemble_rows<decltype(channels)::kSize, decltype(pixels)::kSize>(weights, rows, out,
                                                                              c, p);
        });
      });
      for (int64_t c = 0; c < count; ++c) {
        out.store_channel(c, output, n * output.batch + (channel + c) * output.channel, h);
      }
    }
  }
  return arena.used();
}

// The gradients of the k feature rows that one source row contributes to, as a ring: row y is in
// slot y mod k. A slot is an array of `size` values; what it holds depends on the layout.
template <typename A>
struct GradientRing {
  int64_t kernel, size;
  A* data;

  GradientRing(int64_t kernel, int64_t size, Arena& arena)
      : kernel(kernel), size(size), data(arena.take<A>(kernel * size)) {}

  A* slot(int64_t y) const { return data + (y % kernel + kernel) % kernel * size; }

  void clear(int64_t y) const {
    A* __restrict row = slot(y);
    for (int64_t i = 0; i < size; ++i) row[i] = 0;
  }
};

// Gradients of the features in rows [begin, end): every row takes its contributions from the
// source rows h in ascending order, whichever thread does it. accumulate(n, g, h) adds those of
// row h to the ring; store_row(n, g, y) takes the complete row y from it.
template <typename A, typename Accumulate, typename StoreRow>
void for_gradient_rows(const Shape& shape, const GradientRing<A>& ring, int64_t begin, int64_t end,
                       const Accumulate& accumulate, const StoreRow& store_row) {
  const int64_t radius = shape.radius();
  while (begin < end) {  // the part of the range that is in one image and group
    const int64_t plane = begin / shape.height;
    const int64_t n = plane / shape.groups, g = plane % shape.groups;
    const int64_t next = (plane + 1) * shape.height < end ? (plane + 1) * shape.height : end;
    const int64_t first = begin - plane * shape.height, last = next - plane * shape.height;
    for (int64_t y = 0; y < shape.kernel; ++y) ring.clear(y);
    for (int64_t h = first - radius; h < last + radius; ++h) {
      if (h >= 0 && h < shape.height) accumulate(n, g, h);
      const int64_t complete = h - radius;
      if (complete >= first) store_row(n, g, complete);
      ring.clear(complete);
    }
    begin = next;
  }
}

// grad[u][w] += sum over v, p of weights[p][t][w - v] * out[p][w - v], for U rows and C channels.
template <int64_t U, int64_t C, typename A>
void scatter_rows(const Weights<A>& weights, const OutputRows<A>& out,
                  const GradientRing<A>& grad, int64_t h, int64_t u0, int64_t c0, int64_t c_block) {
  using S = Simd<A>;
  const int64_t kernel = grad.kernel, radius = weights.radius;
  const int64_t padded_width = whole_vectors<A>(weights.width);
  A* target[U];
  for (int64_t u = 0; u < U; ++u) target[u] = grad.slot(h + u0 + u - radius) + c0 * padded_width;
  for (int64_t w = 0; w < padded_width; w += S::kLanes) {
    typename S::Vector sum[C][U];
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t u = 0; u < U; ++u) sum[c][u] = S::load(target[u] + c * padded_width + w);
    }
    for (int64_t v = 0; v < kernel; ++v) {
      const int64_t column = w + 2 * radius - v;  // w - (v - r), in a padded row
      for (int64_t p = 0; p < weights.subpixels; ++p) {
        typename S::Vector y[C];
        for (int64_t c = 0; c < C; ++c) y[c] = S::load(out.padded(c_block + c, p) + column);
        for (int64_t u = 0; u < U; ++u) {
          const auto weight = S::load(weights.padded(p, (u0 + u) * kernel + v) + column);
          for (int64_t c = 0; c < C; ++c) sum[c][u] += weight * y[c];
        }
      }
    }
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t u = 0; u < U; ++u) S::store(target[u] + c * padded_width + w, sum[c][u]);
    }
  }
}

template <typename A>
size_t backward_features_contiguous(const Shape& shape, const Map& grad_output,
                                    const Kernels& kernels, const Map& grad_features,
                                    int64_t begin, int64_t end, char* scratch) {
  const int64_t channels = shape.group_channels();
  const int64_t padded_width = whole_vectors<A>(shape.width);
  Arena arena(scratch);
  const Weights<A> weights(shape, arena);
  const OutputRows<A> out(shape, arena);
  const GradientRing<A> grad(shape.kernel, channels * padded_width, arena);  // slot[c][w]
  A* line = arena.take<A>(2 * weights.row_size);
  if (!scratch) return arena.used();

  const auto accumulate = [&](int64_t n, int64_t g, int64_t h) {
    load_weights(shape, kernels, n, g, h, weights, line);
    for (int64_t first = 0; first < channels; first += kChannelBlock) {
      const int64_t count = channels - first < kChannelBlock ? channels - first : kChannelBlock;
      for (int64_t c = 0; c < count; ++c) {
        const int64_t channel = g * channels + first + c;
        out.load_channel(c, grad_output,
                         n * grad_output.batch + channel * grad_output.channel, h);
      }
      with_kernel_rows(shape.kernel, [&](auto block) {
        constexpr int64_t kRows = decltype(block)::kSize;
        for (int64_t u = 0; u < shape.kernel; u += kRows) {
          for_blocks<2>(count, [&](auto block, int64_t c) {
            scatter_rows<kRows, decltype(block)::kSize>(weights, out, grad, h, u, first + c, c);
          });
        }
      });
    }
  };
  const auto store_row = [&](int64_t n, int64_t g, int64_t y) {
    for (int64_t c = 0; c < channels; ++c) {
      store(grad.slot(y) + c * padded_width, grad_features.type, grad_features.data,
            n * grad_features.batch + (g * channels + c) * grad_features.channel +
                y * grad_features.row,
            1, shape.width);
    }
  };
  for_gradient_rows(shape, grad, begin, end, accumulate, store_row);
  return arena.used();
}

// grad[p][t][w] += sum over c of out[c][p][w] * rows[c][u][w + v], for P subpixels and V taps.
template <int64_t P, int64_t V, typename A>
void correlate_rows(const OutputRows<A>& out, const FeatureRows<A>& rows, const Weights<A>& grad,
                    int64_t p0, int64_t u, int64_t v0, int64_t count) {
  using S = Simd<A>;
  const int64_t t0 = u * rows.kernel + v0;
  for (int64_t w = 0; w < grad.width; w += S::kLanes) {
    typename S::Vector sum[P][V];
    for (int64_t p = 0; p < P; ++p) {
      for (int64_t v = 0; v < V; ++v) sum[p][v] = S::load(grad.at(p0 + p, t0 + v) + w);
    }
    for (int64_t c = 0; c < count; ++c) {
      typename S::Vector y[P];
      for (int64_t p = 0; p < P; ++p) y[p] = S::load(out.at(c, p0 + p) + w);
      for (int64_t v = 0; v < V; ++v) {
        const auto x = S::load(rows.padded(c, u) + w + v0 + v);
        for (int64_t p = 0; p < P; ++p) sum[p][v] += y[p] * x;
      }
    }
    for (int64_t p = 0; p < P; ++p) {
      for (int64_t v = 0; v < V; ++v) S::store(grad.at(p0 + p, t0 + v) + w, sum[p][v]);
    }
  }
}

template <typename A>
size_t backward_kernels_contiguous(const Shape& shape, const Map& grad_output, const Map& features,
                                   const Kernels& kernels, const Kernels& grad_kernels,
                                   int64_t begin, int64_t end, char* scratch) {
  const int64_t channels = shape.group_channels();
  Arena arena(scratch);
  const Weights<A> weights(shape, arena);
  const Weights<A> grad(shape, arena);
  const FeatureRows<A> rows(shape, arena);
  const OutputRows<A> out(shape, arena);
  A* line = arena.take<A>(2 * weights.row_size);
  if (!scratch) return arena.used();

  for (int64_t index = begin; index < end; ++index) {
    const int64_t h = index % shape.height;
    const int64_t g = index / shape.height % shape.groups;
    const int64_t n = index / shape.height / shape.groups;
    for (int64_t i = 0; i < grad.subpixels * grad.taps * grad.row_size; ++i) grad.data[i] = 0;
    for (int64_t first = 0; first < channels; first += kChannelBlock) {
      const int64_t count = channels - first < kChannelBlock ? channels - first : kChannelBlock;
      for (int64_t c = 0; c < count; ++c) {
        const int64_t channel = g * channels + first + c;
        rows.load_channel(c, features, n * features.batch + channel * features.channel, h);
        out.load_channel(c, grad_output,
                         n * grad_output.batch + channel * grad_output.channel, h);
      }
      with_kernel_rows(shape.kernel, [&](auto block) {
        constexpr int64_t kTaps = decltype(block)::kSize;
        for_blocks<2>(shape.subpixels(), [&](auto pixels, int64_t p) {
          for (int64_t u = 0; u < shape.kernel; ++u) {
            for (int64_t v = 0; v < shape.kernel; v += kTaps) {
              correlate_rows<decltype(pixels)::kSize, kTaps>(out, rows, grad, p, u, v, count);
            }
          }
        });
      });
    }
    if (kernels.softmax) load_weights(shape, kernels, n, g, h, weights, line);
    store_weight_gradients(shape, grad_kernels, n, g, h, weights, grad, line);
  }
  return arena.used();
}

// ---------------------------------------------------------------------- channels-last features

// Rows h - r to h + r of the features as a ring, row y in slot y mod k: slot[w][c] with columns
// from -r on. Rows and columns outside the map are zero.
template <typename A>
struct FeatureRing {
  int64_t kernel, radius, width, channels, pixel_size, row_size;
  A* data;

  FeatureRing(const Shape& shape, Arena& arena)
      : kernel(shape.kernel),
        radius(shape.radius()),
        width(shape.width),
        channels(shape.group_channels()),
        pixel_size(whole_vectors<A>(channels)),
        row_size((width + 2 * radius) * pixel_size),
        data(arena.take<A>(kernel * row_size)) {}

  const A* at(int64_t y, int64_t x) const {
    return data + (y % kernel + kernel) % kernel * row_size + (x + radius) * pixel_size;
  }

  void load_row(const Shape& shape, const Map& features, int64_t n, int64_t g, int64_t y) const {
    for (int64_t x = 0; x < width; ++x) {
      A* pixel = const_cast<A*>(at(y, x));
      if (y >= 0 && y < shape.height) {
        load(pixel, features.type, features.data,
             n * features.batch + g * channels + y * features.row + x * features.column, 1,
             channels);
      } else {
        for (int64_t c = 0; c < channels; ++c) pixel[c] = 0;
      }
    }
  }

  // Makes rows h - r to h + r available. Rows come in ascending order; `fresh` starts a new map.
  void advance(const Shape& shape, const Map& features, int64_t n, int64_t g, int64_t h,
               bool fresh) const {
    for (int64_t y = fresh ? h - radius : h + radius; y <= h + radius; ++y) {
      load_row(shape, features, n, g, y);
    }
  }
};

// The s * s output pixels of source pixel (h, w): pixels[p][c].
template <typename A>
struct OutputPixels {
  int64_t scale, channels, pixel_size;
  A* data;

  OutputPixels(const Shape& shape, Arena& arena)
      : scale(shape.scale),
        channels(shape.group_channels()),
        pixel_size(whole_vectors<A>(channels)),
        data(arena.take<A>(shape.subpixels() * pixel_size)) {}

  A* at(int64_t p) const { return data + p * pixel_size; }

  int64_t offset(const Map& map, int64_t n, int64_t g, int64_t h, int64_t w, int64_t p) const {
    return n * map.batch + g * channels + (h * scale + p / scale) * map.row +
           (w * scale + p % scale) * map.column;
  }

  void load_pixels(const Map& map, int64_t n, int64_t g, int64_t h, int64_t w) const {
    for (int64_t p = 0; p < scale * scale; ++p) {
      load(at(p), map.type, map.data, offset(map, n, g, h, w, p), 1, channels);
    }
  }

  void store_pixels(const Map& map, int64_t n, int64_t g, int64_t h, int64_t w) const {
    for (int64_t p = 0; p < scale * scale; ++p) {
      store(at(p), map.type, map.data, offset(map, n, g, h, w, p), 1, channels);
    }
  }
};

// out[p][c] = sum over t of weights[p][t][w] * rows[h + u][w + v][c], Q vectors of channels.
template <int64_t Q, int64_t P, typename A>
void reassemble_pixel(const Weights<A>& weights, const FeatureRing<A>& rows,
                      const OutputPixels<A>& out, int64_t h, int64_t w, int64_t q0, int64_t p0) {
  using S = Simd<A>;
  const int64_t radius = rows.radius;
  typename S::Vector sum[Q][P] = {};
  for (int64_t u = 0; u < rows.kernel; ++u) {
    const A* row = rows.at(h + u - radius, w - radius) + q0 * S::kLanes;
    for (int64_t v = 0; v < rows.kernel; ++v) {
      typename S::Vector x[Q];
      for (int64_t q = 0; q < Q; ++q) x[q] = S::load(row + v * rows.pixel_size + q * S::kLanes);
      for (int64_t p = 0; p < P; ++p) {
        const A weight = weights.at(p0 + p, u * rows.kernel + v)[w];
        for (int64_t q = 0; q < Q; ++q) sum[q][p] += weight * x[q];
      }
    }
  }
  for (int64_t q = 0; q < Q; ++q) {
    for (int64_t p = 0; p < P; ++p) S::store(out.at(p0 + p) + (q0 + q) * S::kLanes, sum[q][p]);
  }
}

template <typename A>
size_t forward_channels_last(const Shape& shape, const Map& features, const Kernels& kernels,
                             const Map& output, int64_t begin, int64_t end, char* scratch) {
  Arena arena(scratch);
  const Weights<A> weights(shape, arena);
  const FeatureRing<A> rows(shape, arena);
  const OutputPixels<A> out(shape, arena);
  A* line = arena.take<A>(2 * weights.row_size);
  if (!scratch) return arena.used();

  for (int64_t index = begin; index < end; ++index) {
    const int64_t h = index % shape.height;
    const int64_t g = index / shape.height % shape.groups;
    const int64_t n = index / shape.height / shape.groups;
    load_weights(shape, kernels, n, g, h, weights, line);
    rows.advance(shape, features, n, g, h, index == begin || h == 0);
    for (int64_t w = 0; w < shape.width; ++w) {
      for_blocks<2>(rows.pixel_size / Simd<A>::kLanes, [&](auto vectors, int64_t q) {
        for_blocks<4>(shape.subpixels(), [&](auto pixels, int64_t p) {
          reassemble_pixel<decltype(vectors)::kSize, decltype(pixels)::kSize>(weights, rows, out,
                                                                              h, w, q, p);
        });
      });
      out.store_pixels(output, n, g, h, w);
    }
  }
  return arena.used();
}

// grad[h + u][w + v][c] += sum over p of weights[p][t][w] * out[p][c], for P subpixels.
template <int64_t P, typename A>
void scatter_pixel(const Weights<A>& weights, const OutputPixels<A>& out,
                   const GradientRing<A>& grad, int64_t h, int64_t w, int64_t p0) {
  using S = Simd<A>;
  const int64_t kernel = grad.kernel, radius = weights.radius;
  for (int64_t c = 0; c < out.pixel_size; c += S::kLanes) {
    typename S::Vector y[P];
    for (int64_t p = 0; p < P; ++p) y[p] = S::load(out.at(p0 + p) + c);
    for (int64_t u = 0; u < kernel; ++u) {
      // slots start at column -r: this is column w - r
      A* row = grad.slot(h + u - radius) + w * out.pixel_size + c;
      for (int64_t v = 0; v < kernel; ++v) {
        A* target = row + v * out.pixel_size;
        auto sum = S::load(target);
        for (int64_t p = 0; p < P; ++p) {
          sum += weights.at(p0 + p, u * kernel + v)[w] * y[p];
        }
        S::store(target, sum);
      }
    }
  }
}

template <typename A>
size_t backward_features_channels_last(const Shape& shape, const Map& grad_output,
                                       const Kernels& kernels, const Map& grad_features,
                                       int64_t begin, int64_t end, char* scratch) {
  const int64_t channels = shape.group_channels(), radius = shape.radius();
  Arena arena(scratch);
  const Weights<A> weights(shape, arena);
  const OutputPixels<A> out(shape, arena);
  // slot[w][c] with columns from -r on
  const GradientRing<A> grad(shape.kernel, (shape.width + 2 * radius) * out.pixel_size, arena);
  A* line = arena.take<A>(2 * weights.row_size);
  if (!scratch) return arena.used();

  const auto accumulate = [&](int64_t n, int64_t g, int64_t h) {
    load_weights(shape, kernels, n, g, h, weights, line);
    for (int64_t w = 0; w < shape.width; ++w) {
      out.load_pixels(grad_output, n, g, h, w);
      for_blocks<4>(shape.subpixels(), [&](auto pixels, int64_t p) {
        scatter_pixel<decltype(pixels)::kSize>(weights, out, grad, h, w, p);
      });
    }
  };
  const auto store_row = [&](int64_t n, int64_t g, int64_t y) {
    for (int64_t x = 0; x < shape.width; ++x) {
      store(grad.slot(y) + (x + radius) * out.pixel_size, grad_features.type, grad_features.data,
            n * grad_features.batch + g * channels + y * grad_features.row +
                x * grad_features.column,
            1, channels);
    }
  };
  for_gradient_rows(shape, grad, begin, end, accumulate, store_row);
  return arena.used();
}

// grad[p][t][w] = sum over c of out[p][c] * rows[h + u][w + v][c], for P subpixels.
template <int64_t P, typename A>
void correlate_pixel(const OutputPixels<A>& out, const FeatureRing<A>& rows,
                     const Weights<A>& grad, int64_t h, int64_t w, int64_t p0) {
  using S = Simd<A>;
  const int64_t radius = rows.radius;
  for (int64_t u = 0; u < rows.kernel; ++u) {
    for (int64_t v = 0; v < rows.kernel; ++v) {
      const A* pixel = rows.at(h + u - radius, w + v - radius);
      typename S::Vector sum[P] = {};
      for (int64_t c = 0; c < out.pixel_size; c += S::kLanes) {
        const auto x = S::load(pixel + c);
        for (int64_t p = 0; p < P; ++p) sum[p] += S::load(out.at(p0 + p) + c) * x;
      }
      for (int64_t p = 0; p < P; ++p) grad.at(p0 + p, u * rows.kernel + v)[w] = S::sum(sum[p]);
    }
  }
}

template <typename A>
size_t backward_kernels_channels_last(const Shape& shape, const Map& grad_output,
                                      const Map& features, const Kernels& kernels,
                                      const Kernels& grad_kernels, int64_t begin, int64_t end,
                                      char* scratch) {
  Arena arena(scratch);
  const Weights<A> weights(shape, arena);
  const Weights<A> grad(shape, arena);
  const FeatureRing<A> rows(shape, arena);
  const OutputPixels<A> out(shape, arena);
  A* line = arena.take<A>(2 * weights.row_size);
  if (!scratch) return arena.used();

  for (int64_t index = begin; index < end; ++index) {
    const int64_t h = index % shape.height;
    const int64_t g = index / shape.height % shape.groups;
    const int64_t n = index / shape.height / shape.groups;
    rows.advance(shape, features, n, g, h, index == begin || h == 0);
    for (int64_t w = 0; w < shape.width; ++w) {
      out.load_pixels(grad_output, n, g, h, w);
      for_blocks<4>(shape.subpixels(), [&](auto pixels, int64_t p) {
        correlate_pixel<decltype(pixels)::kSize>(out, rows, grad, h, w, p);
      });
    }
    if (kernels.softmax) load_weights(shape, kernels, n, g, h, weights, line);
    store_weight_gradients(shape, grad_kernels, n, g, h, weights, grad, line);
  }
  return arena.used();
}

// ---------------------------------------------------------------------------- the three kernels

size_t forward(const Shape& shape, const Map& features, const Kernels& kernels, const Map& output,
               int64_t begin, int64_t end, char* scratch) {
  const bool is_double = features.type == Type::kDouble;
  const auto run = shape.channels_last
                       ? (is_double ? forward_channels_last<double> : forward_channels_last<float>)
                       : (is_double ? forward_contiguous<double> : forward_contiguous<float>);
  return run(shape, features, kernels, output, begin, end, scratch);
}

size_t backward_features(const Shape& shape, const Map& grad_output, const Kernels& kernels,
                         const Map& grad_features, int64_t begin, int64_t end, char* scratch) {
  const bool is_double = grad_output.type == Type::kDouble;
  const auto run = shape.channels_last ? (is_double ? backward_features_channels_last<double>
                                                    : backward_features_channels_last<float>)
                                       : (is_double ? backward_features_contiguous<double>
                                                    : backward_features_contiguous<float>);
  return run(shape, grad_output, kernels, grad_features, begin, end, scratch);
}

size_t backward_kernels(const Shape& shape, const Map& grad_output, const Map& features,
                        const Kernels& kernels, const Kernels& grad_kernels, int64_t begin,
                        int64_t end, char* scratch) {
  const bool is_double = features.type == Type::kDouble;
  const auto run = shape.channels_last ? (is_double ? backward_kernels_channels_last<double>
                                                    : backward_kernels_channels_last<float>)
                                       : (is_double ? backward_kernels_contiguous<double>
                                                    : backward_kernels_contiguous<float>);
  return run(shape, grad_output, features, kernels, grad_kernels, begin, end, scratch);
}

}  // namespace

const CpuKernels CARAFE_CPU_KERNELS = {forward, backward_features, backward_kernels};

}  // namespace carafe_d2
