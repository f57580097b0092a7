// Several values that one instruction moves.
#pragma once

namespace carafe_d2 {

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
};

}  // namespace carafe_d2
