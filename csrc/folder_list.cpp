#include "folder_list.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <exception>
#include <memory>
#include <string_view>
#include <thread>

#include "errors.h"

namespace deit_fast {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint64_t kCheckEvery = 256;  // entries
constexpr auto kCheckAfter = std::chrono::milliseconds(50);

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

bool ends_with(std::string_view name, std::string_view suffix) {
  if (name.size() < suffix.size()) return false;
  const auto same = [](char small, char letter) {
    return letter == small || ('A' <= letter && letter <= 'Z' && letter + ('a' - 'A') == small);
  };
  return std::equal(suffix.begin(), suffix.end(), name.end() - suffix.size(), same);
}

bool is_image_name(std::string_view name, const std::vector<std::string>& suffixes) {
  const auto is_suffix = [&](const std::string& suffix) { return ends_with(name, suffix); };
  return name[0] != '.' && std::any_of(suffixes.begin(), suffixes.end(), is_suffix);
}

struct Entry {
  std::string_view name;  // a zero byte follows it
  bool is_known;          // whether the system said if it is a folder, as it does not of links
  bool is_folder;
  int64_t size;
  int error;  // of the system, where neither is known
};

// All entries without sizes, in the order of the system. `names` holds their names.
std::vector<Entry> read_entries(DIR* folder, const std::string& path,
                                const std::function<void()>& check, std::string* names) {
  std::vector<Entry> entries;
  while (true) {
    errno = 0;
    const dirent* found = ::readdir(folder);
    if (found == nullptr) break;
    const std::string_view name = found->d_name;
    if (name == "." || name == "..") continue;
    const bool is_known = found->d_type != DT_LNK && found->d_type != DT_UNKNOWN;
    entries.push_back({{}, is_known, found->d_type == DT_DIR, kGone, 0});
    names->append(name).push_back('\0');
    if (entries.size() % kCheckEvery == 0) check();
  }
  if (errno != 0) throw IoError(errno, path, "reading");
  const char* start = names->data();
  for (Entry& entry : entries) {
    entry.name = start;
    start += entry.name.size() + 1;
  }
  return entries;
}

// One request for what is a link, and for an image's size. What is gone, or forbidden, keeps kGone;
// any other error may pass later, so it is kept.
void look_up(int folder, Entry* entry) {
  struct stat status;
  if (::fstatat(folder, entry->name.data(), &status, 0) == 0) {
    entry->is_folder = S_ISDIR(status.st_mode);
    entry->size = status.st_size;
    return;
  }
  const std::array<int, 5> gone = {ENOENT, ENOTDIR, ELOOP, ENAMETOOLONG, EACCES};
  if (std::find(gone.begin(), gone.end(), errno) == gone.end()) entry->error = errno;
}

void look_up_all(int folder, const std::vector<std::string>& suffixes, int threads,
                 const std::function<void()>& check, std::vector<Entry>* entries) {
  std::atomic<size_t> next{0};
  const auto ask = [&](const std::function<void()>& now_and_then) {
    size_t asked = 0;
    auto checked = Clock::now();
    for (size_t i = next++; i < entries->size(); i = next++) {
      Entry* entry = &(*entries)[i];
      const bool is_image = !entry->is_folder && is_image_name(entry->name, suffixes);
      if (is_image || !entry->is_known) look_up(folder, entry);
      if (++asked % kCheckEvery == 0 || Clock::now() - checked > kCheckAfter) {
        now_and_then();
        checked = Clock::now();
      }
    }
  };
  std::vector<std::thread> others;
  std::exception_ptr failure;
  const size_t most = std::min(static_cast<size_t>(std::max(threads, 1)), entries->size());
  try {
    while (others.size() + 1 < most) others.emplace_back(ask, [] {});
  } catch (const std::exception&) {
    // The system allows no more threads: fewer ask.
  }
  try {
    ask(check);
  } catch (...) {
    failure = std::current_exception();
    next = entries->size();
  }
  for (std::thread& other : others) other.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace

FolderList list_folder(const std::string& path, const std::vector<std::string>& suffixes,
                       int threads, const std::function<void()>& check) {
  const Folder folder = open_folder(path);
  std::string names;
  std::vector<Entry> entries = read_entries(folder.get(), path, check, &names);
  look_up_all(::dirfd(folder.get()), suffixes, threads, check, &entries);

  FolderList list;
  list.entries = entries.size();
  std::vector<Entry> images;
  for (const Entry& entry : entries) {
    if (entry.error != 0) {
      throw IoError(entry.error, path + "/" + std::string(entry.name), "looking up");
    }
    const bool is_hidden = entry.name[0] == '.';
    if (entry.is_folder) {
      (is_hidden ? list.hidden_folders : list.folders).emplace_back(entry.name);
    } else if (is_image_name(entry.name, suffixes)) {
      images.push_back(entry);
    } else {
      (is_hidden ? list.hidden_files : list.others).emplace_back(entry.name);
    }
  }
  const auto by_name = [](const Entry& a, const Entry& b) { return a.name < b.name; };
  std::sort(images.begin(), images.end(), by_name);
  list.sizes.reserve(images.size());
  for (const Entry& image : images) {
    list.images.append(image.name).push_back('\0');
    list.sizes.push_back(image.size);
  }
  return list;
}

}  // namespace deit_fast
