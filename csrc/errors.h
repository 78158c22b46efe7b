// Errors of this library, which csrc/bindings.cpp turns into Python's.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace deit_fast {

// The bytes of a file are not what the format allows. The text names file and block.
struct FormatError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A system call failed. `note` names the operation.
struct IoError : std::runtime_error {
  IoError(int code, std::string path, std::string note)
      : std::runtime_error(path + ": " + note + ": " + std::strerror(code)),
        code(code),
        path(std::move(path)),
        note(std::move(note)) {}
  int code;
  std::string path;
  std::string note;
};

}  // namespace deit_fast
