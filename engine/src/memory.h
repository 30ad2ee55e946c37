// Memory on a cache line, with slack behind it for whole-block loads. Tests have it lie against pages that nobody may
// touch: a read or write beyond the slack then ends the process.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>

#include "kernels/kernels.h"
#include "lowbit/engine.h"

namespace lowbit {

// What DebugGuardPages() chose for the allocations from now on.
Guard CurrentGuard();

// The byte that guarded memory is filled with, so that nothing in it is right by chance: 0xff makes NaN and -1, 0x7f
// large numbers of every type.
inline int Garbage(Guard side) { return side == Guard::kBehind ? 0xff : 0x7f; }

// How to give memory back.
struct Block {
  void* data = nullptr;
  void* pages = nullptr;  // of a guarded block: the whole mapping
  size_t length = 0;
};

// `bytes` and kSlack, on a cache line; guarded, at `alignment`, so that they end where a page does. Throws
// std::bad_alloc.
Block Allocate(size_t bytes, size_t alignment);
void Release(const Block& block);

// Zeroed memory; what is in its slack is nobody's business.
template <typename T>
class Aligned {
 public:
  Aligned() = default;
  explicit Aligned(size_t size, size_t alignment = 64) : size_(size) {
    const Block block = Allocate(size * sizeof(T), alignment);
    data_ = {static_cast<T*>(block.data), Free{block}};
    std::fill_n(reinterpret_cast<char*>(data_.get()), size * sizeof(T), char(0));
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_.get()[i]; }
  const T& operator[](size_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    Block block;
    void operator()(T*) const { Release(block); }
  };
  std::unique_ptr<T, Free> data_;
  size_t size_ = 0;
};

}  // namespace lowbit
