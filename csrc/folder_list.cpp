#include "folder_list.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <exception>
#include <memory>
#include <string_view>
#include <system_error>
#include <thread>

#include "errors.h"

namespace deit_fast {
namespace {

constexpr uint64_t kCheckEvery = 256;  // entries

struct CloseFolder {
  void operator()(DIR* folder) const { ::closedir(folder); }
};
using Folder = std::unique_ptr<DIR, CloseFolder>;

Folder open_folder(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) throw IoError(errno, path, "opening");
  Folder folder(::fdopendir(fd));
  if (folder) return folder;
  const int code = errno;
  ::close(fd);
  throw IoError(code, path, "opening");
}

// Whether it is a folder, or a link to one. A link that leads nowhere is none.
bool is_folder(int folder, const dirent& entry) {
  if (entry.d_type == DT_DIR) return true;
  if (entry.d_type != DT_LNK && entry.d_type != DT_UNKNOWN) return false;
  struct stat status;
  return ::fstatat(folder, entry.d_name, &status, 0) == 0 && S_ISDIR(status.st_mode);
}

bool ends_with(std::string_view name, std::string_view suffix) {
  if (name.size() < suffix.size()) return false;
  const auto same = [](char small, char letter) {
    return letter == small || ('A' <= letter && letter <= 'Z' && letter + ('a' - 'A') == small);
  };
  return std::equal(suffix.begin(), suffix.end(), name.end() - suffix.size(), same);
}

// Reads the entries into `list`, but the images' names into `images`, a zero byte after each.
void read_entries(DIR* folder, const std::string& path, const std::vector<std::string>& suffixes,
                  const std::function<void()>& check, FolderList* list, std::string* images) {
  while (true) {
    errno = 0;
    const dirent* entry = ::readdir(folder);
    if (entry == nullptr) break;
    const std::string_view name = entry->d_name;
    if (name == "." || name == "..") continue;
    if (++list->entries % kCheckEvery == 0) check();
    const auto is_suffix = [&](const std::string& suffix) { return ends_with(name, suffix); };
    if (is_folder(::dirfd(folder), *entry)) {
      (name[0] == '.' ? list->hidden_folders : list->folders).emplace_back(name);
    } else if (name[0] == '.') {
      list->hidden_files.emplace_back(name);
    } else if (std::none_of(suffixes.begin(), suffixes.end(), is_suffix)) {
      list->others.emplace_back(name);
    } else {
      images->append(name).push_back('\0');
    }
  }
  if (errno != 0) throw IoError(errno, path, "reading");
}

std::vector<std::string_view> sorted_names(const std::string& images) {
  std::vector<std::string_view> names;
  for (size_t start = 0; start < images.size(); start += names.back().size() + 1) {
    names.emplace_back(images.data() + start);
  }
  std::sort(names.begin(), names.end());
  return names;
}

int64_t size_of(int folder, const char* name) {
  struct stat status;
  return ::fstatat(folder, name, &status, 0) == 0 ? int64_t{status.st_size} : kGone;
}

// A zero byte follows each name.
std::vector<int64_t> sizes_of(int folder, const std::vector<std::string_view>& names, int threads,
                              const std::function<void()>& check) {
  std::vector<int64_t> sizes(names.size());
  std::atomic<size_t> next{0};
  const auto ask = [&](const std::function<void()>& now_and_then) {
    size_t asked = 0;
    for (size_t i = next++; i < names.size(); i = next++) {
      sizes[i] = size_of(folder, names[i].data());
      if (++asked % kCheckEvery == 0) now_and_then();
    }
  };
  std::vector<std::thread> others;
  std::exception_ptr failure;
  try {
    while (static_cast<int>(others.size()) + 1 < threads) others.emplace_back(ask, [] {});
  } catch (const std::system_error&) {
    // The system allows no more threads: fewer ask.
  }
  try {
    ask(check);
  } catch (...) {
    failure = std::current_exception();
    next = names.size();
  }
  for (std::thread& other : others) other.join();
  if (failure) std::rethrow_exception(failure);
  return sizes;
}

}  // namespace

FolderList list_folder(const std::string& path, const std::vector<std::string>& suffixes,
                       int threads, const std::function<void()>& check) {
  const Folder folder = open_folder(path);
  FolderList list;
  std::string images;
  read_entries(folder.get(), path, suffixes, check, &list, &images);
  const std::vector<std::string_view> names = sorted_names(images);
  list.sizes = sizes_of(::dirfd(folder.get()), names, threads, check);
  list.images.reserve(images.size());
  for (const std::string_view name : names) list.images.append(name).push_back('\0');
  return list;
}

}  // namespace deit_fast
