#pragma once

#include <sstream>
#include <stdexcept>

namespace nudging::cpu {

// Throw std::invalid_argument with the parts written one after the other.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

}  // namespace nudging::cpu
