#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>

namespace lowbit {
namespace {

std::atomic<Guard> guard{Guard::kNone};

// One page that can't be touched on the chosen side of as many as `bytes` need.
Block Guarded(size_t bytes, size_t alignment, Guard side) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), inside = (bytes + page - 1) / page * page, length = inside + page;
  void* const pages = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  char* const first = static_cast<char*>(pages);
  const bool behind = side == Guard::kBehind;
  if (mprotect(behind ? first + inside : first, page, PROT_NONE) != 0) {
    munmap(pages, length);
    throw std::bad_alloc();
  }
  std::memset(behind ? first : first + page, Garbage(side), inside);
  return {behind ? first + (inside - bytes) / alignment * alignment : first + page, pages, length};
}

}  // namespace

Guard CurrentGuard() { return guard; }
void DebugGuardPages(Guard side) { guard = side; }

Block Allocate(size_t bytes, size_t alignment) {
  if (bytes > std::numeric_limits<size_t>::max() / 2) throw std::bad_alloc();
  const Guard side = guard;
  if (side != Guard::kNone) return Guarded(bytes + kSlack, alignment, side);
  void* const data = ::operator new(bytes + kSlack, std::align_val_t(64));
  std::memset(static_cast<char*>(data) + bytes, 0, kSlack);
  return {data, nullptr, 0};
}

void Release(const Block& block) {
  if (block.pages) {
    munmap(block.pages, block.length);
  } else {
    ::operator delete(block.data, std::align_val_t(64));
  }
}

int DebugTouch(int64_t size, int64_t at) {
  Aligned<char> buffer(size_t(size), 1);
  const volatile char* const byte = buffer.data() + at;
  return *byte;
}

}  // namespace lowbit
