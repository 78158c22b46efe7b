// The entries of one folder, with the sizes of its images.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace deit_fast {

constexpr int64_t kGone = -1;  // size of a link to nothing, or to what this user may not see

// Names as the system gives them, without the folder.
struct FolderList {
  std::string images;          // sorted by their bytes, with a zero byte after each
  std::vector<int64_t> sizes;  // of the images, in bytes, or kGone
  // In the order of the system.
  std::vector<std::string> folders;         // and links to folders
  std::vector<std::string> hidden_folders;  // whose name starts with a dot
  std::vector<std::string> hidden_files;
  std::vector<std::string> others;  // files that are no image
  uint64_t entries = 0;             // all of these
};

// Lists `path`. An image is a file whose name ends with one of `suffixes`, which are in small
// letters, in small or capital ones. `threads` ask for sizes and for what links lead to: more than
// one where a reply comes from a server. `check` is called now and then on the calling thread;
// what it throws ends the call. Throws IoError where the folder or an entry cannot be read.
FolderList list_folder(const std::string& path, const std::vector<std::string>& suffixes,
                       int threads, const std::function<void()>& check);

}  // namespace deit_fast
