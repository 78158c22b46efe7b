// Runs every operation of a cache once for each codec, built with sanitizers: encode, write from two
// writers, rewrite, read, read ahead, gather from several threads, decode.
//
//   operations FOLDER
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>

#include "harness.h"

using namespace deit_fast;

namespace {

std::string view_name(const std::string& folder, int kind, uint64_t view) {
  return folder + "/kind-" + std::to_string(kind) + "-view-" + std::to_string(view);
}

std::vector<unsigned char> write_view(const std::string& path, const Shape& shape, Random& random) {
  const ViewSpec& spec = shape.spec;
  const std::vector<unsigned char> records = make_records(shape, random, make_logits(shape, random));
  ViewWriter first(path, path + ".tmp-1", spec), second(path, path + ".tmp-2", spec);
  const auto commit = [&](ViewWriter& writer, uint64_t block) {
    const unsigned char* data = records.data() + block * spec.block_records * spec.record_bytes;
    writer.commit(block, data, spec.block_bytes(block));
  };
  for (uint64_t block = 0; block < spec.blocks(); ++block) commit(block % 2 ? first : second, block);
  commit(first, 0);  // again
  second.sync();
  try {
    first.commit(0, records.data(), 1);
    fail("a block of the wrong size was accepted");
  } catch (const FormatError&) {
  }
  try {
    first.commit(spec.blocks(), records.data(), 1);
    fail("a block that the view does not have was accepted");
  } catch (const FormatError&) {
  }
  for (const BlockState state : first.table_states()) require(state == BlockState::complete, "complete");
  return records;
}

// Against the formula of docs/cache-format.md, in double.
void check_topk(const Shape& shape, const unsigned char* record, const DecodedRecords& decoded_records, size_t index) {
  const RecordLayout& layout = shape.layout;
  float tail = 0, norm = 0;
  std::memcpy(&tail, record + layout.tail_offset, 4);
  std::memcpy(&norm, record + layout.tail_offset + 4, 4);
  require(decoded_records.tails[index] == tail, "the tail");
  double mass = std::exp(static_cast<double>(tail));
  for (uint32_t i = 0; i < layout.k; ++i) {
    uint16_t half = 0;
    std::memcpy(&half, record + layout.k * layout.id_bytes + 2 * i, 2);
    const double stored = half_value(half) / static_cast<double>(layout.tau) - norm;
    const double found = decoded_records.numbers[index * layout.k + i];
    require(std::fabs(found - stored) < 1e-5, "a log-probability");
    mass += std::exp(found);
  }
  require(std::fabs(mass - 1) < 1e-5, "mass one");
}

void check_tokens(const Shape& shape, const unsigned char* record, const DecodedRecords& decoded_records, size_t index) {
  const RecordLayout& layout = shape.layout;
  const size_t values = layout.tokens * layout.num_classes;
  for (size_t i = 0; i < values; ++i) {
    const unsigned char* token = record + i / layout.num_classes * (4 + layout.num_classes);
    const unsigned char code = token[4 + i % layout.num_classes];
    float scale = 0;
    std::memcpy(&scale, token, 4);
    const int magnitude = code & 0x7F;
    const double small = std::ldexp(magnitude % 8, -9), exponent = magnitude / 8 - 7;
    double value = magnitude < 8 ? small : std::ldexp(1 + (magnitude % 8) / 8.0, static_cast<int>(exponent));
    if (magnitude == 0x7F) value = NAN;
    if (code & 0x80) value = -value;
    if (layout.kind == RecordKind::token_int8) value = code < 128 ? code : code - 256;
    const float expected = static_cast<float>(value) * scale, found = decoded_records.numbers[index * values + i];
    require(found == expected || (std::isnan(found) && std::isnan(expected)), "a feature");
  }
}

void run(const std::string& folder, int kind) {
  Random random{static_cast<uint64_t>(kind)};
  const uint64_t count = kind == kWideKind ? 9 : 203;
  Shape shape = make_shape(kind, count, kind == kWideKind ? 4 : 16);
  std::vector<View> views;
  std::vector<std::vector<unsigned char>> records;
  for (uint64_t view = 0; view < 3; ++view) {
    shape.spec.view_id = view;
    records.push_back(write_view(view_name(folder, kind, view), shape, random));
    views.push_back(std::make_shared<ViewReader>(view_name(folder, kind, view), shape.spec));
  }
  ViewTable table;
  for (const View& view : views) table.add(view);
  std::vector<std::thread> threads;
  for (uint64_t thread = 0; thread < 4; ++thread) {
    std::vector<int64_t> rows(117), ids(117);
    for (size_t i = 0; i < rows.size(); ++i) {
      rows[i] = static_cast<int64_t>(random.below(count));
      ids[i] = static_cast<int64_t>(random.below(3));
    }
    Located located;
    require(table.locate(ids.data(), ids.size(), 1, &located) < 0, "views are there");
    const auto unread = unread_blocks(located, rows.data(), rows.size());
    threads.emplace_back([=] {
      for (const auto& [view, block] : unread) {
        view->will_need(block);
        view->require_block(block);
        view->map_pages(block);
      }
      require(will_need_records(located, rows.data(), rows.size()) > 0, "records of verified blocks");
    });
    threads.emplace_back([=, &shape, &records] {
      DecodedRecords decoded_records(shape.layout, rows.size());
      gather(located, rows.data(), rows.size(), shape.layout, decoded_records.out);
      decoded_records.require_ids_below(shape.layout.num_classes);
      const RecordKind kind = shape.layout.kind;
      const bool of_tokens = kind == RecordKind::token_int8 || kind == RecordKind::token_fp8;
      const auto check = kind == RecordKind::topk ? check_topk : of_tokens ? check_tokens : nullptr;
      for (size_t i = 0; i < rows.size() && check != nullptr; ++i) {
        const size_t offset = static_cast<size_t>(rows[i]) * shape.spec.record_bytes;
        check(shape, records[static_cast<size_t>(ids[i])].data() + offset, decoded_records, i);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  table.trim(1);
  for (uint64_t row = 0; row < count; ++row) {
    const unsigned char* written = records[1].data() + row * shape.spec.record_bytes;
    require(std::memcmp(views[1]->record(static_cast<int64_t>(row)), written, shape.spec.record_bytes) == 0,
            "what was written");
  }
}

}  // namespace

int main(int count, char** words) {
  if (count != 2) return 2;
  for (int kind = 0; kind < kKinds; ++kind) run(words[1], kind);
  std::printf("operations: encode, write, read, read ahead, gather, decode of %d codecs; no finding\n",
              kKinds);
  return 0;
}
