#include "nudging/pages.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace nudging {

constexpr std::size_t kLargePage = std::size_t{2} << 20;

Pages::Pages(std::size_t size) : mapped_size_(size + kLargePage), size_(size) {
  mapped_ =
      ::mmap(nullptr, mapped_size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped_ == MAP_FAILED) throw std::bad_alloc();
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(mapped_) + kLargePage - 1;
  data_ = reinterpret_cast<void*>(address / kLargePage * kLargePage);
#ifdef MADV_HUGEPAGE
  // Advice: a system without large pages refuses it, and small ones serve.
  (void)::madvise(data_, size_, MADV_HUGEPAGE);
#endif
}

Pages::~Pages() { ::munmap(mapped_, mapped_size_); }

}  // namespace nudging
