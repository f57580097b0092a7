// The operators of carafe_d2: their schemas, the checks of their arguments, and everything that
// does not depend on the device. The kernels are in cpu/ and cuda/; autograd is in
// carafe_d2/ops.py.
#include "carafe.h"

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

namespace carafe_d2 {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// True for dense channels-last tensors for which the layout makes a difference: one that is
// contiguous as well (one channel, one pixel, nothing) counts as contiguous.
// `_memory_format` in carafe_d2/ops.py must agree.
bool is_channels_last(const Tensor& tensor) {
  if (tensor.is_contiguous()) return false;
  int64_t expected = 1;
  for (const int dim : {1, 3, 2, 0}) {
    if (tensor.size(dim) == 1) continue;
    if (tensor.stride(dim) != expected) return false;
    expected *= tensor.size(dim);
  }
  return true;
}

// ------------------------------------------------------------------------------------- checks

std::ostream& operator<<(std::ostream& text, Sizes sizes) {
  text << '(';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  return text << ')';
}

// The parts become text only if the condition fails: that takes longer than all other checks.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  const std::string index = std::to_string(tensor.get_device_index());
  return tensor.is_cuda() ? "cuda:" + index : "another device type, index " + index;
}

bool is_supported(ScalarType type) {
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return Type::kDouble;
    case ScalarType::Float: return Type::kFloat;
    case ScalarType::Half: return Type::kHalf;
    default: return Type::kBFloat16;
  }
}

void check_tensor(const char* name, const char* axes, const Tensor& tensor) {
  check(tensor.dim() == 4, name, ": expected a tensor of rank 4, ", axes, ", but got rank ",
        tensor.dim(), " with shape ", tensor.sizes());
  check(is_supported(tensor.scalar_type()), name,
        ": expected dtype float64, float32, float16 or bfloat16, but got ", tensor.scalar_type());
}

void check_same_device(const char* name, const Tensor& tensor, const Tensor& features) {
  check(tensor.is_cpu() == features.is_cpu() && tensor.is_cuda() == features.is_cuda() &&
            tensor.get_device_index() == features.get_device_index(),
        name, ": expected a tensor on ", device_name(features), ", where features are, but got ",
        device_name(tensor));
}

// Saturates, so that absurd arguments end in a shape mismatch.
int64_t product(std::initializer_list<int64_t> factors) {
  int64_t result = 1;
  for (const int64_t factor : factors) {
    if (__builtin_mul_overflow(result, factor, &result)) return INT64_MAX;
  }
  return result;
}

enum class Operator { kCarafe, kCarafeUpsample, kCarafeDownsample, kCarafeDownsampleSoftmax };

// Whether the weights are logits, in the order of the content encoder, rather than masks.
constexpr bool is_fused(Operator op) {
  return op == Operator::kCarafeUpsample || op == Operator::kCarafeDownsampleSoftmax;
}

constexpr bool is_downsampling(Operator op) {
  return op == Operator::kCarafeDownsample || op == Operator::kCarafeDownsampleSoftmax;
}

const char* axes_of_weights(Operator op) {
  if (is_downsampling(op)) return "(N, group_size*k*k, ceil(H/s), ceil(W/s))";
  return is_fused(op) ? "(N, group_size*k*k*s*s, H, W)" : "(N, group_size*k*k, s*H, s*W)";
}

Shape check_arguments(Operator op, const Tensor& features, const Tensor& weights,
                      int64_t kernel_size, int64_t group_size, int64_t scale_factor) {
  const char* name = is_fused(op) ? "kernel_logits" : "masks";
  check(kernel_size > 0 && kernel_size % 2 == 1,
        "kernel_size: expected a positive odd number, but got ", kernel_size);
  check(scale_factor >= 1, "scale_factor: expected at least 1, but got ", scale_factor);
  check(group_size >= 1, "group_size: expected at least 1, but got ", group_size);
  check_tensor("features", "(N, C, H, W)", features);
  check_tensor(name, axes_of_weights(op), weights);
  check_same_device(name, weights, features);
  const bool is_double = features.scalar_type() == ScalarType::Double;
  check(is_double == (weights.scalar_type() == ScalarType::Double), name, ": expected dtype ",
        is_double ? "float64" : "float32, float16 or bfloat16", " with features of ",
        features.scalar_type(), ", but got ", weights.scalar_type());
  Shape shape{features.size(0), features.size(1), features.size(2),
              features.size(3), kernel_size,      group_size,
              scale_factor,     /*stride=*/1,     is_channels_last(features)};
  if (is_downsampling(op)) {
    // There is one location at a stride of the whole map or more; so no product of it overflows.
    shape.stride = std::min(scale_factor, std::max<int64_t>({1, shape.height, shape.width}));
    shape.scale = 1;
  }
  check(shape.channels % group_size == 0, "group_size: expected a divisor of the ", shape.channels,
        " channels of features, but got ", group_size);

  const int64_t channel_scale = is_fused(op) ? shape.scale : 1;
  const int64_t map_scale = is_fused(op) ? 1 : shape.scale;
  const int64_t expected[] = {
      shape.batch, product({group_size, kernel_size, kernel_size, channel_scale, channel_scale}),
      product({shape.rows(), map_scale}), product({shape.columns(), map_scale})};
  const Sizes expected_sizes(expected, 4);
  check(weights.sizes().equals(expected_sizes), name, ": expected shape ", expected_sizes,
        " for features of shape ", features.sizes(), " with kernel_size ", kernel_size,
        ", group_size ", group_size, " and scale_factor ", scale_factor, ", but got ",
        weights.sizes());
  return shape;
}

void check_grad_output(const Shape& shape, const Tensor& grad_output, const Tensor& features) {
  check_tensor("grad_output", "like the output", grad_output);
  check_same_device("grad_output", grad_output, features);
  check(grad_output.scalar_type() == features.scalar_type(), "grad_output: expected dtype ",
        features.scalar_type(), " as features have, but got ", grad_output.scalar_type());
  const int64_t expected[] = {shape.batch, shape.channels, shape.rows() * shape.scale,
                              shape.columns() * shape.scale};
  const Sizes expected_sizes(expected, 4);
  check(grad_output.sizes().equals(expected_sizes), "grad_output: expected shape ", expected_sizes,
        ", but got ", grad_output.sizes());
}

// ------------------------------------------------------------------------------------- layout

MemoryFormat memory_format(bool channels_last) {
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

Tensor empty(Sizes sizes, const Tensor& like, bool channels_last) {
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              memory_format(channels_last));
}

// Kernels run along the innermost dimension of a layout; the other strides are free.
Tensor with_layout(const Tensor& tensor, bool channels_last) {
  const int innermost = channels_last ? 1 : 3;
  if (tensor.size(innermost) <= 1 || tensor.stride(innermost) == 1) return tensor;
  return torch::stable::contiguous(tensor, memory_format(channels_last));
}

Map map_of(const Tensor& tensor) {
  return {tensor.data_ptr(), type_of(tensor),  tensor.stride(0),
          tensor.stride(1),  tensor.stride(2), tensor.stride(3)};
}

Weights weights_of(Operator op, const Shape& shape, const Tensor& tensor) {
  const Map map = map_of(tensor);
  Weights weights{};
  weights.data = map.data;
  weights.type = map.type;
  weights.batch_stride = map.batch_stride;
  if (!is_fused(op)) {
    weights.tap_stride = map.channel_stride;
    weights.row_stride = shape.scale * map.row_stride;
    weights.sub_row_stride = map.row_stride;
    weights.column_stride = shape.scale * map.column_stride;
    weights.sub_column_stride = map.column_stride;
  } else {  // the channel order of pixel_shuffle
    weights.tap_stride = shape.subpixels() * map.channel_stride;
    weights.row_stride = map.row_stride;
    weights.sub_row_stride = shape.scale * map.channel_stride;
    weights.column_stride = map.column_stride;
    weights.sub_column_stride = map.channel_stride;
    weights.softmax = true;
  }
  weights.group_stride = shape.taps() * weights.tap_stride;
  return weights;
}

// ---------------------------------------------------------------------------------- operators

const Backend& backend_of(const Tensor& features) {
  if (features.is_cpu()) return kCpuBackend;
#ifdef CARAFE_D2_WITH_CUDA
  return kCudaBackend;
#else
  throw std::runtime_error(
      "features: on " + device_name(features) +
      ", but carafe_d2 was built without CUDA. Rebuild it with nvcc on the PATH or CUDA_HOME set: "
      "pip install -e . --no-build-isolation");
#endif
}

// Makes the device of `tensor` the current one for its lifetime; nothing to do on the CPU.
class CurrentDevice {
 public:
  explicit CurrentDevice(const Tensor& tensor) {
    if (tensor.is_cuda()) guard_.emplace(tensor.get_device_index());
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

template <Operator op>
Tensor forward(const Tensor& features, const Tensor& weights, int64_t kernel_size,
               int64_t group_size, int64_t scale_factor) {
  const Shape shape = check_arguments(op, features, weights, kernel_size, group_size, scale_factor);
  const Backend& backend = backend_of(features);
  const CurrentDevice device(features);
  const int64_t sizes[] = {shape.batch, shape.channels, shape.rows() * shape.scale,
                           shape.columns() * shape.scale};
  Tensor output = empty(Sizes(sizes, 4), features, shape.channels_last);
  if (output.numel() > 0) {
    const Tensor source = with_layout(features, shape.channels_last);
    backend.forward(shape, map_of(source), weights_of(op, shape, weights), map_of(output));
  }
  return output;
}

// Gradients that are not wanted come back as tensors of size (0,).
template <Operator op>
std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& features,
                                    const Tensor& weights, int64_t kernel_size, int64_t group_size,
                                    int64_t scale_factor, bool want_features, bool want_weights) {
  const Shape shape = check_arguments(op, features, weights, kernel_size, group_size, scale_factor);
  check_grad_output(shape, grad_output, features);
  const Backend& backend = backend_of(features);
  const CurrentDevice device(features);
  const int64_t none[] = {0};
  Tensor grad_features = want_features ? empty(features.sizes(), features, shape.channels_last)
                                       : torch::stable::new_empty(features, Sizes(none, 1));
  Tensor grad_weights = want_weights ? empty(weights.sizes(), weights, is_channels_last(weights))
                                     : torch::stable::new_empty(weights, Sizes(none, 1));
  const bool has_features = grad_features.numel() > 0, has_weights = grad_weights.numel() > 0;
  if (has_features || has_weights) {
    const Tensor grad = with_layout(grad_output, shape.channels_last);
    const Tensor source = with_layout(features, shape.channels_last);
    const Map features_grad = has_features ? map_of(grad_features) : Map{};
    const Weights weights_grad = has_weights ? weights_of(op, shape, grad_weights) : Weights{};
    backend.backward(shape, map_of(grad), map_of(source), weights_of(op, shape, weights),
                     has_features ? &features_grad : nullptr,
                     has_weights ? &weights_grad : nullptr);
  }
  return {grad_features, grad_weights};
}

STABLE_TORCH_LIBRARY(carafe_d2, library) {
  library.def(
      "carafe(Tensor features, Tensor masks, int kernel_size, int group_size, int scale_factor)"
      " -> Tensor");
  library.def(
      "carafe_backward(Tensor grad_output, Tensor features, Tensor masks, int kernel_size,"
      " int group_size, int scale_factor, bool features_grad, bool masks_grad)"
      " -> (Tensor, Tensor)");
  library.def(
      "carafe_upsample(Tensor features, Tensor kernel_logits, int kernel_size, int group_size,"
      " int scale_factor) -> Tensor");
  library.def(
      "carafe_upsample_backward(Tensor grad_output, Tensor features, Tensor kernel_logits,"
      " int kernel_size, int group_size, int scale_factor, bool features_grad, bool logits_grad)"
      " -> (Tensor, Tensor)");
  library.def(
      "carafe_downsample(Tensor features, Tensor masks, int kernel_size, int group_size,"
      " int scale_factor) -> Tensor");
  library.def(
      "carafe_downsample_backward(Tensor grad_output, Tensor features, Tensor masks,"
      " int kernel_size, int group_size, int scale_factor, bool features_grad, bool masks_grad)"
      " -> (Tensor, Tensor)");
  library.def(
      "carafe_downsample_softmax(Tensor features, Tensor kernel_logits, int kernel_size,"
      " int group_size, int scale_factor) -> Tensor");
  library.def(
      "carafe_downsample_softmax_backward(Tensor grad_output, Tensor features,"
      " Tensor kernel_logits, int kernel_size, int group_size, int scale_factor,"
      " bool features_grad, bool logits_grad) -> (Tensor, Tensor)");
}

void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("carafe", TORCH_BOX(&forward<Operator::kCarafe>));
  library.impl("carafe_backward", TORCH_BOX(&backward<Operator::kCarafe>));
  library.impl("carafe_upsample", TORCH_BOX(&forward<Operator::kCarafeUpsample>));
  library.impl("carafe_upsample_backward", TORCH_BOX(&backward<Operator::kCarafeUpsample>));
  library.impl("carafe_downsample", TORCH_BOX(&forward<Operator::kCarafeDownsample>));
  library.impl("carafe_downsample_backward", TORCH_BOX(&backward<Operator::kCarafeDownsample>));
  library.impl("carafe_downsample_softmax",
               TORCH_BOX(&forward<Operator::kCarafeDownsampleSoftmax>));
  library.impl("carafe_downsample_softmax_backward",
               TORCH_BOX(&backward<Operator::kCarafeDownsampleSoftmax>));
}

STABLE_TORCH_LIBRARY_IMPL(carafe_d2, CPU, library) { implement(library); }

STABLE_TORCH_LIBRARY_IMPL(carafe_d2, CUDA, library) { implement(library); }

}  // namespace
}  // namespace carafe_d2
