// From the types that tensors have at run time to the template arguments of the kernels.
#pragma once

#include "../carafe.h"
#include "../half.h"

namespace carafe_d2 {

template <typename A, typename T, typename K>
struct Types {
  using Accumulation = A;
  using Feature = T;
  using Kernel = K;
};

template <typename T, typename Body>
void with_kernel_type(Type type, const Body& body) {
  switch (type) {
    case Type::kHalf: return body(Types<float, T, Half>());
    case Type::kBFloat16: return body(Types<float, T, BFloat16>());
    default: return body(Types<float, T, float>());
  }
}

// Calls body(Types) with the C++ types of features and reassembly kernels.
template <typename Body>
void with_types(const Map& features, const Kernels& kernels, const Body& body) {
  switch (features.type) {
    case Type::kDouble: return body(Types<double, double, double>());
    case Type::kFloat: return with_kernel_type<float>(kernels.type, body);
    case Type::kHalf: return with_kernel_type<Half>(kernels.type, body);
    case Type::kBFloat16: return with_kernel_type<BFloat16>(kernels.type, body);
  }
}

}  // namespace carafe_d2
