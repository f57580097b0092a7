// The CPU kernels, written once for all instruction sets (see simd.h): CARAFE_CPU_KERNELS is the
// name of the table that this compilation defines.
//
// One vector holds the same pixel of adjacent channels, whatever the layout in memory: a weight is
// then one number for a whole register, and neither borders nor odd widths waste lanes. Rows of the
// maps go through small buffers in which channels are adjacent, the numbers are of the accumulation
// type and the zeros around the map are really there. `load_pixels`, `load_matrix` and
// `store_matrix`, which fill and empty these buffers, are the only functions that know layouts and
// storage types.
//
// Work goes row by row of the source locations, and in a row tile by tile: as many locations as a
// vector has lanes. The k rows of features around the current one are kept as a ring.
#include "kernels.h"
#include "simd.h"

namespace carafe_d2 {
namespace {

// Registers that the innermost loops keep sums in: channel vectors x subpixels, taps x subpixels.
constexpr int64_t kVectors = CARAFE_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int64_t kSubpixels = 4;
constexpr int64_t kTaps = CARAFE_VECTOR_BYTES == 64 ? 5 : 2;

// Hands out pieces of the scratch memory; without memory it only counts.
class Arena {
 public:
  explicit Arena(char* memory) : memory_(memory) {}

  template <typename T>
  T* take(int64_t count) {
    const size_t offset = used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return memory_ ? reinterpret_cast<T*>(memory_ + offset) : nullptr;
  }

  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

template <int64_t N>
struct Size {
  static constexpr int64_t value = N;
};

// Calls body(Size<n>) for an n from 1 to Most.
template <int64_t Most, typename Body>
CARAFE_INLINE void with_size(int64_t n, const Body& body) {
  if constexpr (Most > 1) {
    if (n < Most) return with_size<Most - 1>(n, body);
  }
  body(Size<Most>());
}

// Calls body(Size<n>, first) for the parts of [0, count) that have at most Most elements.
template <int64_t Most, typename Body>
CARAFE_INLINE void for_parts(int64_t count, const Body& body) {
  for (int64_t first = 0; first < count; first += Most) {
    with_size<Most>(minimum(count - first, Most), [&](auto size) { body(size, first); });
  }
}

// -------------------------------------------------------------- between tensors and buffers

// Element (i, j) is `row_stride * i + column_stride * j` elements behind `offset`.
struct Matrix {
  void* data;
  Type type;
  int64_t offset, row_stride, column_stride;
};

template <typename Body>
void with_elements(float, const Matrix& matrix, const Body& body) {
  switch (matrix.type) {
    case Type::kHalf: return body(static_cast<Half*>(matrix.data) + matrix.offset);
    case Type::kBFloat16: return body(static_cast<BFloat16*>(matrix.data) + matrix.offset);
    default: return body(static_cast<float*>(matrix.data) + matrix.offset);
  }
}

template <typename Body>
void with_elements(double, const Matrix& matrix, const Body& body) {
  body(static_cast<double*>(matrix.data) + matrix.offset);
}

// target[i * target_row + j] = source[i + j * column] for up to a vector of rows i and of columns j,
// and zeros for the other columns.
template <typename A, typename T>
void load_transposed(A* target, int64_t target_row, const T* source, int64_t column, int64_t rows,
                     int64_t columns) {
  constexpr int64_t kFull = kLanes<A>;
  Vector<A> square[kFull];
  if (rows == kFull && columns == kFull) {
    CARAFE_UNROLL
    for (int64_t j = 0; j < kFull; ++j) square[j] = load(source + j * column);
  } else {
    CARAFE_UNROLL
    for (int64_t j = 0; j < kFull; ++j) {
      square[j] = j < columns ? load_few<A>(source + j * column, rows) : Vector<A>{};
    }
  }
  transpose<A>(square);
  if (rows == kFull) {
    CARAFE_UNROLL
    for (int64_t i = 0; i < kFull; ++i) store(target + i * target_row, square[i]);
  } else {
    CARAFE_UNROLL
    for (int64_t i = 0; i < kFull; ++i) {
      if (i < rows) store(target + i * target_row, square[i]);
    }
  }
}

// target[i + j * column] = source[i * source_row + j] for up to a vector of rows i and of columns j.
template <bool Streaming = false, typename A, typename T>
void store_transposed(const A* source, int64_t source_row, T* target, int64_t column, int64_t rows,
                      int64_t columns) {
  constexpr int64_t kFull = kLanes<A>;
  Vector<A> square[kFull];
  CARAFE_UNROLL
  for (int64_t i = 0; i < kFull; ++i) {
    square[i] = load(source + minimum(i, rows - 1) * source_row);
  }
  transpose<A>(square);
  if (rows == kFull && columns == kFull) {
    CARAFE_UNROLL
    for (int64_t j = 0; j < kFull; ++j) {
      if constexpr (Streaming) {
        stream(target + j * column, square[j]);
      } else {
        store(target + j * column, square[j]);
      }
    }
  } else {
    CARAFE_UNROLL
    for (int64_t j = 0; j < kFull; ++j) {
      if (j < columns) store_few<A>(target + j * column, square[j], rows);
    }
  }
}

// Calls body(first, n) for vectors of `count` rows. If there is at least one, the last one ends
// where the rows end and overlaps with the one before it.
template <typename A, typename Body>
CARAFE_INLINE void for_vectors(int64_t count, const Body& body) {
  if (count < kLanes<A>) return body(0, count);
  for (int64_t first = 0; first < count; first += kLanes<A>) {
    body(minimum(first, count - kLanes<A>), kLanes<A>);
  }
}

// target[i * target_row + j] = source (i, j), with zeros behind each row up to a whole vector.
template <typename A>
void load_matrix(A* target, int64_t target_row, const Matrix& source, int64_t rows,
                 int64_t columns) {
  with_elements(A(), source, [&](const auto* elements) {
    if (source.column_stride == 1) {
      for (int64_t i = 0; i < rows; ++i, target += target_row, elements += source.row_stride) {
        int64_t j = 0;
        for (; j + kLanes<A> <= columns; j += kLanes<A>) store(target + j, load(elements + j));
        if (j < columns) store(target + j, load_few<A>(elements + j, columns - j));
      }
    } else if (source.row_stride == 1) {
      for (int64_t j = 0; j < columns; j += kLanes<A>) {
        for_vectors<A>(rows, [&](int64_t i, int64_t n) {
          load_transposed(target + i * target_row + j, target_row,
                          elements + i + j * source.column_stride, source.column_stride, n,
                          minimum(kLanes<A>, columns - j));
        });
      }
    } else {
      for (int64_t i = 0; i < rows; ++i, target += target_row, elements += source.row_stride) {
        for (int64_t j = 0; j < columns; ++j)
          target[j] = to_float(elements[j * source.column_stride]);
        for (int64_t j = columns; j < whole_vectors<A>(columns); ++j) target[j] = 0;
      }
    }
  });
}

// target (i, j) = source[i * source_row + j].
template <typename A>
void store_matrix(const A* source, int64_t source_row, const Matrix& target, int64_t rows,
                  int64_t columns) {
  with_elements(A(), target, [&](auto* elements) {
    if (target.column_stride == 1) {
      for (int64_t i = 0; i < rows; ++i, source += source_row, elements += target.row_stride) {
        int64_t j = 0;
        for (; j + kLanes<A> <= columns; j += kLanes<A>) store(elements + j, load(source + j));
        if (j < columns) store_few<A>(elements + j, load(source + j), columns - j);
      }
    } else if (target.row_stride == 1) {
      for (int64_t j = 0; j < columns; j += kLanes<A>) {
        for_vectors<A>(rows, [&](int64_t i, int64_t n) {
          store_transposed(source + i * source_row + j, source_row,
                           elements + i + j * target.column_stride, target.column_stride, n,
                           minimum(kLanes<A>, columns - j));
        });
      }
    } else {
      for (int64_t i = 0; i < rows; ++i, source += source_row, elements += target.row_stride) {
        for (int64_t j = 0; j < columns; ++j)
          from_float(source[j], elements[j * target.column_stride]);
      }
    }
  });
}

// `store_matrix` past the caches where whole, aligned vectors are written: the target is not read
// before it is overwritten, and what is in the caches stays there. Of adjacent rows or columns.
inline void stream_matrix(const float* source, int64_t source_row, const Matrix& target,
                          int64_t rows, int64_t columns) {
  constexpr int64_t kFull = kLanes<float>;
  float* elements = static_cast<float*>(target.data) + target.offset;
  const int64_t stride = target.column_stride == 1 ? target.row_stride : target.column_stride;
  const int64_t misaligned = reinterpret_cast<uintptr_t>(elements) / sizeof(float) % kFull;
  const bool is_stream = target.type == Type::kFloat && stride % kFull == 0;
  if (is_stream && target.column_stride == 1 && misaligned == 0 && columns % kFull == 0) {
    for (int64_t i = 0; i < rows; ++i, source += source_row, elements += stride) {
      for (int64_t j = 0; j < columns; j += kFull) stream(elements + j, load(source + j));
    }
  } else if (is_stream && target.row_stride == 1 && columns % kFull == 0) {
    const int64_t lead = minimum((kFull - misaligned) % kFull, rows);
    for (int64_t j = 0; j < columns; j += kFull, elements += kFull * stride, source += kFull) {
      if (lead > 0) store_transposed(source, source_row, elements, stride, lead, kFull);
      int64_t i = lead;
      for (; i + kFull <= rows; i += kFull) {
        store_transposed<true>(source + i * source_row, source_row, elements + i, stride, kFull,
                               kFull);
      }
      if (i < rows) {
        store_transposed(source + i * source_row, source_row, elements + i, stride, rows - i,
                         kFull);
      }
    }
  } else {
    store_matrix(source, source_row, target, rows, columns);
  }
}

inline void stream_matrix(const double* source, int64_t source_row, const Matrix& target,
                          int64_t rows, int64_t columns) {
  store_matrix(source, source_row, target, rows, columns);
}

// -------------------------------------------------------------------------------------- buffers

// A row of source locations of one image and group.
struct Row {
  int64_t n, g, h;

  Row(const Shape& shape, int64_t index)
      : n(index / shape.rows() / shape.groups),
        g(index / shape.rows() % shape.groups),
        h(index % shape.rows()) {}
};

// The channels of a group in blocks of up to kVectors vectors.
template <typename A>
struct Blocks {
  int64_t channels, size, count;

  explicit Blocks(const Shape& shape)
      : channels(shape.group_channels()),
        size(minimum(kVectors * kLanes<A>, whole_vectors<A>(channels))),
        count(size ? (channels + size - 1) / size : 0) {}

  int64_t channels_of(int64_t block) const { return minimum(size, channels - block * size); }
  int64_t vectors_of(int64_t block) const {
    return whole_vectors<A>(channels_of(block)) / kLanes<A>;
  }
};

// The pixels from `column` on of one row of a map, one block of channels: a matrix
// (pixels, channels).
template <typename A>
Matrix pixels_of(const Map& map, const Blocks<A>& blocks, const Row& at, int64_t block, int64_t row,
                 int64_t column) {
  const int64_t channel = at.g * blocks.channels + block * blocks.size;
  return {map.data, map.type,
          at.n * map.batch_stride + channel * map.channel_stride + row * map.row_stride +
              column * map.column_stride,
          map.column_stride, map.channel_stride};
}

// `count` pixels from `column` on of one row of a map, in blocks of channels:
// target[block][pixel][channel].
template <typename A>
void load_pixels(A* target, int64_t block_size, const Blocks<A>& blocks, const Map& map,
                 const Row& at, int64_t row, int64_t column, int64_t count) {
  if (map.channel_stride != 1) {
    for (int64_t block = 0; block < blocks.count; ++block, target += block_size) {
      load_matrix(target, blocks.size, pixels_of(map, blocks, at, block, row, column), count,
                  blocks.channels_of(block));
    }
    return;
  }
  // Channels last: pixel by pixel, in the order of the memory. Of one group they lie apart there, so
  // the processor is told what comes next.
  constexpr int64_t kAhead = 8;  // pixels
  const Matrix source = pixels_of(map, blocks, at, 0, row, column);
  with_elements(A(), source, [&](const auto* elements) {
    for (int64_t i = 0; i < count; ++i, target += blocks.size, elements += source.row_stride) {
      const int64_t ahead = minimum(kAhead, count - 1 - i) * source.row_stride;
      const auto* from = elements;
      for (int64_t block = 0; block < blocks.count; ++block) {
        A* to = target + block * block_size;
        const int64_t channels = blocks.channels_of(block);
        int64_t c = 0;
        for (; c + kLanes<A> <= channels; c += kLanes<A>, from += kLanes<A>) {
          __builtin_prefetch(from + ahead);
          store(to + c, load(from));
        }
        if (c < channels) store(to + c, load_few<A>(from, channels - c));
      }
    }
  });
}

// k rows of the features or of their gradient, r columns wider than the map on either side:
// data[block][slot][column][channel], row y in slot y mod k.
template <typename A>
struct Ring {
  Blocks<A> blocks;
  int64_t kernel, radius, stride, width, row_size, block_size;
  A* data;

  Ring(const Shape& shape, Arena& arena)
      : blocks(shape),
        kernel(shape.kernel),
        radius(shape.radius()),
        stride(shape.stride),
        width(shape.width),
        row_size((width + 2 * radius) * blocks.size),
        block_size(kernel * row_size),
        data(arena.take<A>(blocks.count * block_size)) {}

  int64_t slot(int64_t y) const { return (y % kernel + kernel) % kernel; }

  // Of column x - r.
  A* pixel(int64_t block, int64_t x) const { return data + block * block_size + x * blocks.size; }

  // Of the first tap of location w; what `tap_offsets` gives has to be added.
  A* window(int64_t block, int64_t w) const { return pixel(block, w * stride); }

  // Where the taps of location row h are: offsets[t].
  void tap_offsets(int64_t h, int64_t* offsets) const {
    for (int64_t u = 0; u < kernel; ++u) {
      for (int64_t v = 0; v < kernel; ++v) {
        offsets[u * kernel + v] = slot(h * stride + u - radius) * row_size + v * blocks.size;
      }
    }
  }

  void clear(int64_t y) const {
    for (int64_t block = 0; block < blocks.count; ++block) {
      __builtin_memset(pixel(block, 0) + slot(y) * row_size, 0, row_size * sizeof(A));
    }
  }

  void clear_all() const {
    for (int64_t y = 0; y < kernel; ++y) clear(y);
  }

  void load_row(const Map& map, const Row& at, int64_t y) const {
    load_pixels(pixel(0, radius) + slot(y) * row_size, block_size, blocks, map, at, y, 0, width);
  }

  void store_row(const Map& map, const Row& at, int64_t y) const {
    for (int64_t block = 0; block < blocks.count; ++block) {
      store_matrix(pixel(block, radius) + slot(y) * row_size, blocks.size,
                   pixels_of(map, blocks, at, block, y, 0), width, blocks.channels_of(block));
    }
  }
};

// The ring of the features, moved from one row of locations to the next.
template <typename A>
struct FeatureRing : Ring<A> {
  int64_t height;

  FeatureRing(const Shape& shape, Arena& arena) : Ring<A>(shape, arena), height(shape.height) {}

  // Makes the k rows of features around those locations available. Locations come in ascending
  // order; `fresh` starts a new map.
  void advance(const Map& features, const Row& at, bool fresh) const {
    if (fresh) this->clear_all();
    const int64_t end = at.h * this->stride + this->radius + 1;
    const int64_t missing = fresh ? this->kernel : minimum(this->kernel, this->stride);
    for (int64_t y = end - missing; y < end; ++y) {
      if (y >= 0 && y < height) {
        this->load_row(features, at, y);
      } else {
        this->clear(y);
      }
    }
  }
};

// The output pixels, or their gradients, of `step` adjacent source locations:
// data[block][dy][s * column + dx][channel].
template <typename A>
struct OutputTile {
  Blocks<A> blocks;
  int64_t scale, step, row_size, block_size;
  A* data;
  int64_t* offsets;  // of subpixel p

  OutputTile(const Shape& shape, int64_t step, int64_t block_count, Arena& arena)
      : blocks(shape),
        scale(shape.scale),
        step(step),
        row_size(step * scale * blocks.size),
        block_size(scale * row_size),
        data(arena.take<A>(block_count * block_size)),
        offsets(arena.take<int64_t>(shape.subpixels())) {
    if (!offsets) return;
    for (int64_t p = 0; p < shape.subpixels(); ++p) {
      offsets[p] = p / scale * row_size + p % scale * blocks.size;
    }
  }

  A* pixel(int64_t block, int64_t column) const {
    return data + block * block_size + column * scale * blocks.size;
  }

  // Source locations w to w + count.
  void load(const Map& map, const Row& at, int64_t w, int64_t count) const {
    for (int64_t dy = 0; dy < scale; ++dy) {
      load_pixels(pixel(0, 0) + dy * row_size, block_size, blocks, map, at, at.h * scale + dy,
                  w * scale, count * scale);
    }
  }

  // Of a tile with room for one block.
  void store_only_block(int64_t block, const Map& map, const Row& at, int64_t w, int64_t count,
                        bool is_large) const {
    void (*store)(const A*, int64_t, const Matrix&, int64_t, int64_t) = store_matrix<A>;
    if (is_large) store = stream_matrix;
    for (int64_t dy = 0; dy < scale; ++dy) {
      store(pixel(0, 0) + dy * row_size, blocks.size,
            pixels_of(map, blocks, at, block, at.h * scale + dy, w * scale), count * scale,
            blocks.channels_of(block));
    }
  }
};

// The weights, or their gradients, of a tile of source locations: data[t][p][lane].
template <typename A>
struct WeightTile {
  int64_t taps, scale, subpixels, tap_size;
  A* data;

  // Of the first of `tiles` tiles.
  WeightTile(const Shape& shape, int64_t tiles, Arena& arena)
      : taps(shape.taps()),
        scale(shape.scale),
        subpixels(shape.subpixels()),
        tap_size(subpixels * kLanes<A>),
        data(arena.take<A>(tiles * taps * tap_size)) {}

  WeightTile tile(int64_t index) const {
    WeightTile result = *this;
    result.data += index * taps * tap_size;
    return result;
  }

  A* at(int64_t t, int64_t p) const { return data + t * tap_size + p * kLanes<A>; }

  // Calls body(buffer, buffer_row, matrix, rows) for the parts of the tile that are matrices
  // (taps, pixels) in memory. Of logits that is the whole, because there p and t follow each other.
  template <typename Body>
  void for_matrices(const Weights& weights, const Row& row, int64_t w, const Body& body) const {
    const int64_t offset = row.n * weights.batch_stride + row.g * weights.group_stride +
                           row.h * weights.row_stride + w * weights.column_stride;
    if (weights.sub_row_stride == scale * weights.sub_column_stride &&
        weights.tap_stride == scale * weights.sub_row_stride) {
      return body(data, kLanes<A>,
                  Matrix{weights.data, weights.type, offset, weights.sub_column_stride,
                         weights.column_stride},
                  taps * subpixels);
    }
    for (int64_t p = 0; p < subpixels; ++p) {
      const int64_t sub_offset =
          p / scale * weights.sub_row_stride + p % scale * weights.sub_column_stride;
      body(data + p * kLanes<A>, tap_size,
           Matrix{weights.data, weights.type, offset + sub_offset, weights.tap_stride,
                  weights.column_stride},
           taps);
    }
  }

  // Those of source locations w to w + count, normalized if they are logits.
  void load(const Weights& weights, const Row& row, int64_t w, int64_t count) const {
    for_matrices(weights, row, w, [&](A* buffer, int64_t buffer_row, const Matrix& m, int64_t n) {
      load_matrix(buffer, buffer_row, m, n, count);
    });
    if (weights.softmax) {
      for (int64_t p = 0; p < subpixels; ++p) softmax(p);
    }
  }

  void store(const Weights& weights, const Row& row, int64_t w, int64_t count) const {
    for_matrices(weights, row, w, [&](A* buffer, int64_t buffer_row, const Matrix& m, int64_t n) {
      store_matrix(buffer, buffer_row, m, n, count);
    });
  }

 private:
  void softmax(int64_t p) const {
    using carafe_d2::load, carafe_d2::store;
    Vector<A> largest = load(at(0, p)), sum = {};
    for (int64_t t = 1; t < taps; ++t) {
      const Vector<A> logit = load(at(t, p));
      largest = logit > largest ? logit : largest;
    }
    for (int64_t t = 0; t < taps; ++t) {
      const Vector<A> power = exp_nonpositive(load(at(t, p)) - largest);
      sum += power;
      store(at(t, p), power);
    }
    const Vector<A> normalizer = 1 / sum;
    for (int64_t t = 0; t < taps; ++t) store(at(t, p), load(at(t, p)) * normalizer);
  }
};

// With m = softmax(logits): grad logits[t] = m[t] * (grad m[t] - sum over t' of m[t'] grad m[t']).
template <typename A>
void softmax_backward(const WeightTile<A>& weights, const WeightTile<A>& grad) {
  for (int64_t p = 0; p < weights.subpixels; ++p) {
    Vector<A> sum = {};
    for (int64_t t = 0; t < weights.taps; ++t) sum += load(weights.at(t, p)) * load(grad.at(t, p));
    for (int64_t t = 0; t < weights.taps; ++t) {
      store(grad.at(t, p), load(weights.at(t, p)) * (load(grad.at(t, p)) - sum));
    }
  }
}

// ------------------------------------------------------------------------ the innermost loops

// out[p][c] = sum over t of weights[t][p] * features[t][c]: Q vectors of channels, P subpixels.
template <int64_t Q, int64_t P, typename A>
void reassemble(const A* features, const int64_t* taps, const WeightTile<A>& weights,
                const A* weight, A* out, const int64_t* subpixels) {
  Vector<A> sum[Q][P] = {};
  for (int64_t t = 0; t < weights.taps; ++t, weight += weights.tap_size) {
    const A* pixel = features + taps[t];
    Vector<A> x[Q];
    CARAFE_UNROLL
    for (int64_t q = 0; q < Q; ++q) x[q] = load(pixel + q * kLanes<A>);
    CARAFE_UNROLL
    for (int64_t p = 0; p < P; ++p) {
      CARAFE_UNROLL
      for (int64_t q = 0; q < Q; ++q) sum[q][p] += weight[p * kLanes<A>] * x[q];
    }
  }
  CARAFE_UNROLL
  for (int64_t p = 0; p < P; ++p) {
    CARAFE_UNROLL
    for (int64_t q = 0; q < Q; ++q) store(out + subpixels[p] + q * kLanes<A>, sum[q][p]);
  }
}

// grad[t][c] += sum over p of weights[t][p] * out[p][c], for taps first to last.
template <int64_t Q, int64_t P, typename A>
void scatter(A* grad, const int64_t* taps, int64_t first, int64_t last,
             const WeightTile<A>& weights, const A* weight, const A* out,
             const int64_t* subpixels) {
  Vector<A> y[Q][P];
  CARAFE_UNROLL
  for (int64_t p = 0; p < P; ++p) {
    CARAFE_UNROLL
    for (int64_t q = 0; q < Q; ++q) y[q][p] = load(out + subpixels[p] + q * kLanes<A>);
  }
  weight += first * weights.tap_size;
  for (int64_t t = first; t < last; ++t, weight += weights.tap_size) {
    A* pixel = grad + taps[t];
    Vector<A> sum[Q];
    CARAFE_UNROLL
    for (int64_t q = 0; q < Q; ++q) sum[q] = load(pixel + q * kLanes<A>);
    CARAFE_UNROLL
    for (int64_t p = 0; p < P; ++p) {
      CARAFE_UNROLL
      for (int64_t q = 0; q < Q; ++q) sum[q] += weight[p * kLanes<A>] * y[q][p];
    }
    CARAFE_UNROLL
    for (int64_t q = 0; q < Q; ++q) store(pixel + q * kLanes<A>, sum[q]);
  }
}

// grad[t][p] = the sum over all lanes of sums[t * P + p], from sums[First] on.
template <int64_t P, int64_t First, int64_t Count, typename A>
CARAFE_INLINE void store_sums(Vector<A> (&sums)[Count], const WeightTile<A>& weights, A* grad) {
  constexpr int64_t kAtOnce = Count - First < kLanes<A> ? Count - First : kLanes<A>;
  Vector<A> part[kAtOnce];
  CARAFE_UNROLL
  for (int64_t i = 0; i < kAtOnce; ++i) part[i] = sums[First + i];
  const Vector<A> totals = sum_lanes<A>(part);
  CARAFE_UNROLL
  for (int64_t i = 0; i < kAtOnce; ++i) {
    grad[(First + i) / P * weights.tap_size + (First + i) % P * kLanes<A>] = totals[i];
  }
  if constexpr (First + kAtOnce < Count) store_sums<P, First + kAtOnce>(sums, weights, grad);
}

// grad[t][p] = sum over c of features[t][c] * out[p][c], for T taps and P subpixels.
template <int64_t T, int64_t P, typename A>
void correlate(const Ring<A>& features, const int64_t* taps, const OutputTile<A>& tile, int64_t w,
               const int64_t* subpixels, int64_t column, const WeightTile<A>& weights, A* grad) {
  Vector<A> sum[T * P] = {};
  for (int64_t block = 0; block < features.blocks.count; ++block) {
    const A* x = features.window(block, w);
    const A* out = tile.pixel(block, column);
    for (int64_t q = 0; q < features.blocks.vectors_of(block); ++q) {
      Vector<A> y[P];
      CARAFE_UNROLL
      for (int64_t p = 0; p < P; ++p) y[p] = load(out + subpixels[p] + q * kLanes<A>);
      CARAFE_UNROLL
      for (int64_t t = 0; t < T; ++t) {
        const Vector<A> feature = load(x + taps[t] + q * kLanes<A>);
        CARAFE_UNROLL
        for (int64_t p = 0; p < P; ++p) sum[t * P + p] += feature * y[p];
      }
    }
  }
  store_sums<P, 0>(sum, weights, grad);
}

// ------------------------------------------------------------------------------ the two kernels

// Output that is larger goes past the caches: most of it would not be found there anyway.
constexpr int64_t kLargeOutput = 8 << 20;  // bytes

template <typename A>
size_t forward(const Shape& shape, const Map& features, const Weights& weights, const Map& output,
               int64_t begin, int64_t end, char* scratch) {
  // Source locations whose output is stored together: long runs of memory, in few tiles of weight_tile.
  constexpr int64_t kMostTiles = 6;
  const int64_t most = kMostTiles * kLanes<A>;
  const int64_t columns = shape.columns();
  const int64_t parts = (columns + most - 1) / most;
  const int64_t step = parts ? (columns + parts - 1) / parts : 0;

  Arena arena(scratch);
  const FeatureRing<A> rows(shape, arena);
  const OutputTile<A> tile(shape, step, 1, arena);
  const WeightTile<A> weight_tiles(shape, kMostTiles, arena);
  int64_t* taps = arena.take<int64_t>(shape.taps());
  if (!scratch) return arena.used();

  const bool is_large = shape.batch * shape.channels * shape.rows() * columns * shape.subpixels() *
                            static_cast<int64_t>(sizeof(A)) >
                        kLargeOutput;
  for (int64_t index = begin; index < end; ++index) {
    const Row row(shape, index);
    rows.advance(features, row, index == begin || row.h == 0);
    rows.tap_offsets(row.h, taps);
    for (int64_t w = 0; w < columns; w += step) {
      const int64_t count = minimum(step, columns - w);
      for (int64_t i = 0; i < count; i += kLanes<A>) {
        weight_tiles.tile(i / kLanes<A>).load(weights, row, w + i, minimum(kLanes<A>, count - i));
      }
      for (int64_t block = 0; block < rows.blocks.count; ++block) {
        with_size<kVectors>(rows.blocks.vectors_of(block), [&](auto vectors) {
          for (int64_t i = 0; i < count; ++i) {
            const WeightTile<A> own = weight_tiles.tile(i / kLanes<A>);
            for_parts<kSubpixels>(shape.subpixels(), [&](auto subpixels, int64_t p) {
              reassemble<decltype(vectors)::value, decltype(subpixels)::value>(
                  rows.window(block, w + i), taps, own, own.at(0, p) + i % kLanes<A>,
                  tile.pixel(0, i), tile.offsets + p);
            });
          }
        });
        tile.store_only_block(block, output, row, w, count, is_large);
      }
    }
  }
  if (is_large) finish_streaming();
  return arena.used();
}

// Both gradients in one pass over the rows of locations; either of them may be missing.
//
// A row of the feature gradient takes its contributions from the rows of locations in ascending
// order, whichever thread does it. At both ends of a range, threads visit rows of their neighbors
// for those taps only that reach into the features of their own: `stride` rows for each of theirs.
template <typename A>
size_t backward(const Shape& shape, const Map& grad_output, const Map& features,
                const Weights& weights, const Map* grad_features, const Weights* grad_weights,
                int64_t begin, int64_t end, char* scratch) {
  Arena arena(scratch);
  const FeatureRing<A> rows(shape, arena);
  const Ring<A> grad_rows(shape, arena);
  const Blocks<A>& blocks = rows.blocks;
  // A vector of adjacent output pixels: more, of all channels, would not stay in the first cache.
  const OutputTile<A> tile(shape, maximum(1, kLanes<A> / shape.scale), blocks.count, arena);
  const WeightTile<A> weight_tile(shape, 1, arena), grad_weight_tile(shape, 1, arena);
  int64_t* taps = arena.take<int64_t>(shape.taps());
  if (!scratch) return arena.used();

  const int64_t radius = shape.radius();
  const bool needs_weights = grad_features != nullptr || weights.softmax;

  const auto visit = [&](const Row& row, bool is_own, int64_t first_tap, int64_t last_tap) {
    rows.tap_offsets(row.h, taps);
    for (int64_t w = 0; w < shape.columns(); w += kLanes<A>) {
      const int64_t in_tile = minimum(kLanes<A>, shape.columns() - w);
      if (needs_weights) weight_tile.load(weights, row, w, in_tile);
      for (int64_t first = 0; first < in_tile; first += tile.step) {
        const int64_t count = minimum(tile.step, in_tile - first);
        tile.load(grad_output, row, w + first, count);
        for (int64_t i = 0; is_own && grad_weights && i < count; ++i) {
          for_parts<kSubpixels>(shape.subpixels(), [&](auto subpixels, int64_t p) {
            for_parts<kTaps>(shape.taps(), [&](auto size, int64_t t) {
              correlate<decltype(size)::value, decltype(subpixels)::value>(
                  rows, taps + t, tile, w + first + i, tile.offsets + p, i, grad_weight_tile,
                  grad_weight_tile.at(t, p) + first + i);
            });
          });
        }
        for (int64_t block = 0; grad_features && block < blocks.count; ++block) {
          with_size<kVectors>(blocks.vectors_of(block), [&](auto vectors) {
            for (int64_t i = 0; i < count; ++i) {
              for_parts<kSubpixels>(shape.subpixels(), [&](auto subpixels, int64_t p) {
                scatter<decltype(vectors)::value, decltype(subpixels)::value>(
                    grad_rows.window(block, w + first + i), taps, first_tap, last_tap, weight_tile,
                    weight_tile.at(0, p) + first + i, tile.pixel(block, i), tile.offsets + p);
              });
            }
          });
        }
      }
      if (is_own && grad_weights) {
        if (weights.softmax) softmax_backward(weight_tile, grad_weight_tile);
        grad_weight_tile.store(*grad_weights, row, w, in_tile);
      }
    }
  };

  while (begin < end) {  // the part of the range that is in one image and group
    const Row start(shape, begin);
    const int64_t last = minimum(shape.rows(), start.h + end - begin);
    const int64_t own_begin = start.h * shape.stride;  // rows of features
    const int64_t own_end = minimum(shape.height, last * shape.stride);
    const int64_t reach = grad_features ? radius : 0;
    if (grad_features) grad_rows.clear_all();
    Row row = start;
    for (row.h = start.h - reach / shape.stride;
         row.h < last + (reach + shape.stride - 1) / shape.stride; ++row.h) {
      const bool is_own = row.h >= start.h && row.h < last;
      if (is_own && grad_weights) rows.advance(features, row, row.h == start.h);
      const int64_t top = row.h * shape.stride - radius;  // of the windows of these locations
      if (row.h >= 0 && row.h < shape.rows()) {
        const int64_t first_u = maximum(0, own_begin - top);
        const int64_t last_u = minimum(shape.kernel, own_end - top);
        visit(row, is_own, first_u * shape.kernel, last_u * shape.kernel);
      }
      // Those above the next windows are complete.
      for (int64_t y = maximum(own_begin, top);
           grad_features && y < minimum(own_end, top + shape.stride); ++y) {
        grad_rows.store_row(*grad_features, row, y);
        grad_rows.clear(y);
      }
    }
    begin += last - start.h;
  }
  return arena.used();
}

size_t forward_of_any_type(const Shape& shape, const Map& features, const Weights& weights,
                           const Map& output, int64_t begin, int64_t end, char* scratch) {
  const auto run = features.type == Type::kDouble ? forward<double> : forward<float>;
  return run(shape, features, weights, output, begin, end, scratch);
}

size_t backward_of_any_type(const Shape& shape, const Map& grad_output, const Map& features,
                            const Weights& weights, const Map* grad_features,
                            const Weights* grad_weights, int64_t begin, int64_t end,
                            char* scratch) {
  const auto run = features.type == Type::kDouble ? backward<double> : backward<float>;
  return run(shape, grad_output, features, weights, grad_features, grad_weights, begin, end,
             scratch);
}

}  // namespace

const CpuKernels CARAFE_CPU_KERNELS = {forward_of_any_type, backward_of_any_type};

}  // namespace carafe_d2
