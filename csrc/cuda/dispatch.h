// From what is known at run time to the template arguments of the kernels, and launching them.
#pragma once

#include <type_traits>

#include "../carafe.h"
#include "../half.h"

namespace carafe_d2 {

template <typename A, typename T, typename W>
struct Types {
  using Accumulation = A;
  using Feature = T;
  using Weight = W;
};

template <typename T, typename Body>
void with_weight_type(Type type, const Body& body) {
  switch (type) {
    case Type::kHalf: return body(Types<float, T, Half>());
    case Type::kBFloat16: return body(Types<float, T, BFloat16>());
    default: return body(Types<float, T, float>());
  }
}

// Calls body(Types) with the C++ types of features and weights.
template <typename Body>
void with_types(const Map& features, const Weights& weights, const Body& body) {
  switch (features.type) {
    case Type::kDouble: return body(Types<double, double, double>());
    case Type::kFloat: return with_weight_type<float>(weights.type, body);
    case Type::kHalf: return with_weight_type<Half>(weights.type, body);
    case Type::kBFloat16: return with_weight_type<BFloat16>(weights.type, body);
  }
}

// Calls body(k) with the kernel size as a constant; false for sizes that are left to general.cuh.
template <typename Body>
bool with_kernel_size(const Shape& shape, const Body& body) {
  switch (shape.kernel) {
    case 3: body(std::integral_constant<int, 3>()); return true;
    case 5: body(std::integral_constant<int, 5>()); return true;
    case 7: body(std::integral_constant<int, 7>()); return true;
    default: return false;
  }
}

// A grid of no blocks would be an error.
template <typename Launcher, typename... Parameters, typename... Arguments>
void launch(Launcher& launcher, void (*kernel)(Parameters...), int64_t blocks, int threads,
            const Arguments&... arguments) {
  if (blocks == 0) return;
  launcher.launch(kernel, dim3(static_cast<unsigned>(blocks)), threads, arguments...);
}

}  // namespace carafe_d2
