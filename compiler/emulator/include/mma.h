// nvcuda::wmma. Which lane holds which element of a fragment is nobody's business, so it is scattered here.
#pragma once
#include "cooperation.h"

namespace nvcuda::wmma {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  static constexpr int rows = std::is_same_v<Use, matrix_b> ? K : M;
  static constexpr int columns = std::is_same_v<Use, matrix_a> ? K : N;
  static constexpr int num_elements = rows * columns / 32;
  T x[num_elements];
  // The place in the row-major matrix of element `i` of a lane.
  static EMU_INLINE int place(int lane, int i) {
    return i * 32 + (lane * (std::is_same_v<Use, accumulator> ? 7 : std::is_same_v<Use, matrix_a> ? 11 : 13) + 5) % 32;
  }
};

EMU_FN int lane() { return int((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32); }

template <class F, class T>
__attribute__((no_sanitize("thread", "undefined"), noinline)) void move(F& f, T* memory, unsigned stride, bool row_major,
                                                                        bool store) {
  constexpr int size = int(sizeof(T));
  if (uint64_t(memory) % 32 || stride * size % 16) emu_fail("wmma memory or stride is not aligned (32 and 16 bytes)");
  EmuTile tile{(char*)memory, row_major ? F::rows : F::columns, int(stride) * size,
               (row_major ? F::columns : F::rows) * size};
  emu_collective(emu_tile, store ? 'w' : 'r', ~0u, &tile);
  for (int i = 0; i < F::num_elements; ++i) {
    int at = F::place(lane(), i), r = at / F::columns, c = at % F::columns;
    T& element = memory[row_major ? r * stride + c : c * stride + r];
    if (store) element = f.x[i];
    else f.x[i] = element;
  }
}

template <class Use, int M, int N, int K, class T, class Layout>
EMU_FN void load_matrix_sync(fragment<Use, M, N, K, T, Layout>& f, const T* memory, unsigned stride) {
  move(f, const_cast<T*>(memory), stride, std::is_same_v<Layout, row_major>, false);
}
template <int M, int N, int K, class T>
EMU_FN void load_matrix_sync(fragment<accumulator, M, N, K, T>& f, const T* memory, unsigned stride, layout_t layout) {
  move(f, const_cast<T*>(memory), stride, layout == mem_row_major, false);
}
template <int M, int N, int K, class T>
EMU_FN void store_matrix_sync(T* memory, fragment<accumulator, M, N, K, T>& f, unsigned stride, layout_t layout) {
  move(f, memory, stride, layout == mem_row_major, true);
}
template <class Use, int M, int N, int K, class T, class Layout, class V>
EMU_FN void fill_fragment(fragment<Use, M, N, K, T, Layout>& f, V value) {
  for (auto& x : f.x) x = T(value);
}

template <class D, class A, class B, class C>
struct Product {
  D* d;
  const A* a;
  const B* b;
  const C* c;
};
template <class D, class A, class B, class C>
__attribute__((no_sanitize("thread", "undefined"))) void multiply(EmuWarp& call) {
  static double a[A::rows][A::columns], b[B::rows][B::columns];
  auto of = [&](int lane) { return (Product<D, A, B, C>*)call.operands[lane]; };
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < A::num_elements; ++i) {
      int at = A::place(lane, i);
      a[at / A::columns][at % A::columns] = double(of(lane)->a->x[i]);
    }
    for (int i = 0; i < B::num_elements; ++i) {
      int at = B::place(lane, i);
      b[at / B::columns][at % B::columns] = double(of(lane)->b->x[i]);
    }
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < D::num_elements; ++i) {
      int at = D::place(lane, i);
      double sum = double(of(lane)->c->x[i]);
      for (int k = 0; k < A::columns; ++k) sum += a[at / D::columns][k] * b[k][at % D::columns];
      of(lane)->d->x[i] = sum;
    }
}
template <int M, int N, int K, class TD, class TA, class TB, class LA, class LB, class TC>
EMU_FN void mma_sync(fragment<accumulator, M, N, K, TD>& d, const fragment<matrix_a, M, N, K, TA, LA>& a,
                     const fragment<matrix_b, M, N, K, TB, LB>& b, const fragment<accumulator, M, N, K, TC>& c) {
  using D = fragment<accumulator, M, N, K, TD>;
  using C = fragment<accumulator, M, N, K, TC>;
  using A = fragment<matrix_a, M, N, K, TA, LA>;
  using B = fragment<matrix_b, M, N, K, TB, LB>;
  Product<D, A, B, C> mine{&d, &a, &b, &c};
  emu_collective(multiply<D, A, B, C>, 0, ~0u, &mine);
}
}  // namespace nvcuda::wmma
