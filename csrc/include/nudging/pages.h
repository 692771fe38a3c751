#pragma once

#include <cstddef>

namespace nudging {

// Zeroed memory on large pages where the system has them: a weight is read once a pass from end to
// end, and with small pages the processor looks up an address every 4 KiB.
class Pages {
 public:
  // Throws std::bad_alloc.
  explicit Pages(std::size_t size);
  ~Pages();
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  void* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  void* mapped_;
  std::size_t mapped_size_;
  void* data_;
  std::size_t size_;
};

}  // namespace nudging
