// Python module deit_fast._C. Addresses and sizes are passed as integers: the Python side checks
// dtype, shape, contiguity and device first. All work runs without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>

#include "crc32c.h"
#include "errors.h"
#include "folder_list.h"
#include "logit_cache.h"
#include "record_codec.h"
#include "resize.h"
#include "tail_draws.h"
#include "view_table.h"

namespace py = pybind11;
using namespace deit_fast;

namespace {

using Release = py::call_guard<py::gil_scoped_release>;

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

ViewSpec make_spec(uint64_t num_records, uint32_t record_bytes, uint32_t block_records,
                   uint64_t view_id, uint32_t ids_per_record, uint32_t id_bytes,
                   uint32_t id_limit, const py::bytes& manifest_sha256, uint32_t version) {
  const std::string digest = manifest_sha256;
  ViewSpec spec;
  if (digest.size() != spec.manifest_sha256.size()) throw py::value_error("SHA-256 has 32 bytes");
  spec.num_records = num_records;
  spec.record_bytes = record_bytes;
  spec.block_records = block_records;
  spec.view_id = view_id;
  spec.ids_per_record = ids_per_record;
  spec.id_bytes = id_bytes;
  spec.id_limit = id_limit;
  spec.version = version;
  std::memcpy(spec.manifest_sha256.data(), digest.data(), digest.size());
  spec.check();
  return spec;
}

// Ids out of range in a call: the caller's error, not the file's.
struct IdError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

using Ids = py::array_t<int64_t, py::array::c_style>;

void check_ids(const Ids& ids, int64_t limit, const char* what) {
  const int64_t* values = ids.data();
  uint64_t outside = 0;  // a loop without a branch vectorises
  for (py::ssize_t i = 0; i < ids.size(); ++i) {
    const auto value = static_cast<uint64_t>(values[i]);
    outside |= value | (static_cast<uint64_t>(limit - 1) - value);
  }
  if (outside >> 63 == 0) return;
  for (py::ssize_t i = 0; i < ids.size(); ++i) {
    if (values[i] >= 0 && values[i] < limit) continue;
    throw IdError(std::string(what) + " " + std::to_string(values[i]) + " is not in [0, " +
                  std::to_string(limit) + ")");
  }
}

// The views of one cache.
struct CacheViews {
  int64_t num_samples;
  py::object open;  // Python, by view id: opens a view that is not in the table
  size_t limit;     // views that stay open after a call
  ViewTable table;

  // The views of a batch. view_ids: one for each sample, or a single one.
  Located locate(const Ids& samples, const Ids& view_ids) {
    check_ids(samples, num_samples, "sample id");
    check_ids(view_ids, int64_t{1} << 31, "view id");
    const bool single = view_ids.ndim() == 0;
    const bool paired = view_ids.ndim() == 1 && view_ids.size() == samples.size();
    if (samples.ndim() != 1 || !(single || paired)) {
      throw IdError("sample and view ids must be [n], of the same length n");
    }
    Located located;
    const auto count = static_cast<size_t>(samples.size());
    while (true) {
      const int64_t missing = table.locate(view_ids.data(), count, single ? 0 : 1, &located);
      if (missing < 0) break;
      table.add(open(missing).cast<View>());
    }
    table.trim(limit);
    return located;
  }
};

Decoded outputs(const std::vector<uintptr_t>& addresses) {
  if (addresses.size() != 1 && addresses.size() != 3) throw py::value_error("1 or 3 outputs");
  Decoded out;
  out.first = at<void>(addresses[0]);
  if (addresses.size() == 3) {
    out.second = at<float>(addresses[1]);
    out.third = at<float>(addresses[2]);
  }
  return out;
}

TopKShape topk_shape(uint32_t num_classes, uint32_t k, uint32_t id_bytes,
                     const std::vector<double>& inverse_temperatures) {
  if (k < 1 || k > num_classes || (id_bytes != 2 && id_bytes != 4) || num_classes > (1u << 18)) {
    throw py::value_error("k classes of at most 2^18");
  }
  return {num_classes, k, id_bytes, static_cast<uint32_t>(inverse_temperatures.size()),
          inverse_temperatures.data()};
}

// As os.fsdecode: a path may be no UTF-8.
py::object file_name(const std::string& path) {
  const auto size = static_cast<py::ssize_t>(path.size());
  return py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefaultAndSize(path.data(), size));
}

py::list file_names(const std::vector<std::string>& names) {
  py::list list;
  for (const std::string& name : names) list.append(file_name(name));
  return list;
}

// Lets Ctrl-C end a call that has released the GIL. For the main thread alone: Python gives no other
// one a signal, and ends a thread that asks for the GIL while the interpreter ends.
void check_signals() {
  py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

}  // namespace

// Names of arguments are in deit_fast/_C.pyi.
PYBIND11_MODULE(_C, module) {
  module.doc() = "File format of the teacher-logit cache; use it through deit_fast.cache.";

  py::register_exception<FormatError>(module, "FormatError", PyExc_ValueError);
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const IoError& error) {
      // OSError(errno, text, file name) becomes its subclass for errno, such as FileNotFoundError.
      const std::string text = std::string(std::strerror(error.code)) + " (" + error.note + ")";
      const py::tuple arguments = py::make_tuple(error.code, text, file_name(error.path));
      PyErr_SetObject(PyExc_OSError, arguments.ptr());
    }
  });

  py::register_exception<IdError>(module, "IdError", PyExc_ValueError);

  const auto bind_crc = [&](const char* name, uint32_t (*function)(const void*, size_t, uint32_t)) {
    module.def(
        name,
        [function](const py::object& data, uint32_t crc) {
          Py_buffer view;  // PyBUF_SIMPLE: contiguous bytes
          if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_SIMPLE) != 0) {
            throw py::error_already_set();
          }
          {
            py::gil_scoped_release release;
            crc = function(view.buf, static_cast<size_t>(view.len), crc);
          }
          PyBuffer_Release(&view);
          return crc;
        },
        py::arg("data"), py::arg("crc") = 0);
  };
  bind_crc("crc32c", &crc32c);
  bind_crc("crc32c_table", &crc32c_table);
  bind_crc("crc32c_hardware", &crc32c_hardware);
  module.def("crc32c_has_hardware", &crc32c_has_hardware);

  py::class_<ViewSpec>(module, "ViewSpec")
      .def(py::init(&make_spec), py::kw_only(), py::arg("num_records"), py::arg("record_bytes"),
           py::arg("block_records"), py::arg("view_id"), py::arg("ids_per_record"),
           py::arg("id_bytes"), py::arg("id_limit"), py::arg("manifest_sha256"), py::arg("version"))
      .def_property_readonly("blocks", &ViewSpec::blocks)
      .def_property_readonly("file_bytes", &ViewSpec::file_bytes)
      .def_property_readonly("data_offset", &ViewSpec::data_offset)
      .def("block_offset", &ViewSpec::block_offset)
      .def("block_bytes", &ViewSpec::block_bytes)
      .def("place_crc", &ViewSpec::place_crc)
      .def_property_readonly("header",
                             [](const ViewSpec& spec) { return py::bytes(spec.header()); });

  py::enum_<BlockState>(module, "BlockState")
      .value("pending", BlockState::pending)
      .value("complete", BlockState::complete)
      .value("broken", BlockState::broken);

  py::enum_<Committed>(module, "Committed")
      .value("written", Committed::written)
      .value("kept", Committed::kept)
      .value("kept_others", Committed::kept_others);

  py::class_<ViewFile, std::shared_ptr<ViewFile>>(module, "ViewFile")
      .def(py::init([](const std::string& path, const ViewSpec& spec) {
             return std::make_shared<ViewFile>(path, spec, false);
           }),
           Release())
      .def("table_states", &ViewFile::table_states, Release())
      .def("first_incomplete", &ViewFile::first_incomplete, Release())
      .def("check_block", &ViewFile::check_block, Release());

  py::class_<ViewWriter, ViewFile, std::shared_ptr<ViewWriter>>(module, "ViewWriter")
      .def(py::init<const std::string&, const std::string&, const ViewSpec&, bool>(),
           py::arg("path"), py::arg("temporary"), py::arg("spec"), py::arg("reserve") = true,
           Release())
      .def(
          "commit",
          [](ViewWriter& writer, uint64_t block, uintptr_t data, size_t size) {
            return writer.commit(block, at<const void>(data), size);
          },
          Release())
      .def("sync", &ViewWriter::sync, Release());

  py::class_<ViewReader, ViewFile, std::shared_ptr<ViewReader>>(module, "ViewReader")
      .def(py::init<const std::string&, const ViewSpec&, bool>(), py::arg("path"), py::arg("spec"),
           py::arg("is_growing") = false, Release())
      .def("will_need", &ViewReader::will_need, Release())
      .def(
          "read_block",
          [](const ViewReader& reader, uint64_t block) {
            reader.require_block(block);
            reader.map_pages(block);
          },
          Release());

  py::enum_<RecordKind>(module, "RecordKind")
      .value("copy", RecordKind::copy)
      .value("hard", RecordKind::hard)
      .value("topk", RecordKind::topk)
      .value("int8", RecordKind::int8)
      .value("fp8", RecordKind::fp8)
      .value("token_int8", RecordKind::token_int8)
      .value("token_fp8", RecordKind::token_fp8);

  py::class_<RecordLayout>(module, "RecordLayout")
      .def(py::init([](RecordKind kind, uint32_t record_bytes, uint32_t num_classes,
                       uint32_t id_bytes, uint32_t k, uint32_t tail_offset, float tau,
                       uint32_t tokens) {
             const bool of_tokens =
                 kind == RecordKind::token_int8 || kind == RecordKind::token_fp8;
             if (of_tokens && record_bytes != uint64_t{tokens} * (4 + uint64_t{num_classes})) {
               throw py::value_error("a token has a scale of 4 bytes and a byte per channel");
             }
             return RecordLayout{kind, record_bytes, num_classes, id_bytes,
                                 k,    tail_offset,  tau,         tokens};
           }),
           py::arg("kind"), py::kw_only(), py::arg("record_bytes"), py::arg("num_classes"),
           py::arg("id_bytes") = 2, py::arg("k") = 0, py::arg("tail_offset") = 0,
           py::arg("tau") = 1.0f, py::arg("tokens") = 1);

  py::class_<CacheViews>(module, "CacheViews")
      .def(py::init([](int64_t num_samples, py::object open, size_t limit) {
        return CacheViews{num_samples, std::move(open), limit, {}};
      }))
      .def("gather",
           [](CacheViews& views, const Ids& samples, const Ids& view_ids,
              const RecordLayout& layout, const std::vector<uintptr_t>& addresses) {
             const Located located = views.locate(samples, view_ids);
             const Decoded out = outputs(addresses);
             py::gil_scoped_release release;
             gather(located, samples.data(), static_cast<size_t>(samples.size()), layout, out);
           })
      .def("unread_blocks",
           [](CacheViews& views, const Ids& samples, const Ids& view_ids) {
             const Located located = views.locate(samples, view_ids);
             return unread_blocks(located, samples.data(), static_cast<size_t>(samples.size()));
           })
      .def("will_need", [](CacheViews& views, const Ids& samples, const Ids& view_ids) {
        const Located located = views.locate(samples, view_ids);
        py::gil_scoped_release release;
        return will_need_records(located, samples.data(), static_cast<size_t>(samples.size()));
      });

  module.def(
      "decode_records",
      [](const RecordLayout& layout, uintptr_t records, size_t count,
         const std::vector<uintptr_t>& addresses) {
        decode_records(layout, at<const unsigned char>(records), count, outputs(addresses));
      },
      Release());
  module.def(
      "encode_topk",
      [](uint32_t num_classes, uint32_t k, uint32_t id_bytes,
         const std::vector<double>& inverse_temperatures, uintptr_t logits, int64_t count,
         uintptr_t records) {
        const TopKShape shape = topk_shape(num_classes, k, id_bytes, inverse_temperatures);
        return encode_topk(shape, at<const float>(logits), count, at<unsigned char>(records));
      },
      Release());
  module.def(
      "draw_tails",
      [](uint32_t num_classes, uint32_t k, uint32_t draws,
         const std::vector<double>& inverse_temperatures, uintptr_t logits, uintptr_t heads,
         uintptr_t words, int64_t count, uintptr_t ids) {
        const DrawShape shape{num_classes, k, draws,
                              static_cast<uint32_t>(inverse_temperatures.size()),
                              inverse_temperatures.data()};
        draw_tails(shape, at<const float>(logits), at<const int32_t>(heads),
                   at<const uint32_t>(words), count, at<int32_t>(ids));
      },
      Release());

  module.def(
      "crop_resize",
      [](uintptr_t pixels, int64_t row_bytes, const std::array<int64_t, 4>& box, int64_t out_width,
         int64_t out_height, uintptr_t out) {
        crop_resize(at<const uint8_t>(pixels), row_bytes, box[0], box[1], box[2], box[3],
                    out_width, out_height, at<uint8_t>(out));
      },
      Release());

  py::class_<FolderList>(module, "FolderList")
      .def_property_readonly("images", [](const FolderList& list) { return py::bytes(list.images); })
      .def_property_readonly("sizes",
                             [](const FolderList& list) {
                               const auto count = static_cast<py::ssize_t>(list.sizes.size());
                               return py::array_t<int64_t>(count, list.sizes.data());
                             })
      .def_property_readonly("folders",
                             [](const FolderList& list) { return file_names(list.folders); })
      .def_property_readonly("hidden_folders",
                             [](const FolderList& list) { return file_names(list.hidden_folders); })
      .def_property_readonly("hidden_files",
                             [](const FolderList& list) { return file_names(list.hidden_files); })
      .def_property_readonly("others",
                             [](const FolderList& list) { return file_names(list.others); })
      .def_readonly("entries", &FolderList::entries);
  module.attr("GONE") = kGone;
  module.def("list_folder", [](const py::bytes& path, const std::vector<std::string>& suffixes,
                               int threads) {
    const std::string folder = path;
    const auto threading = py::module_::import("threading");
    const bool is_main = threading.attr("current_thread")().is(threading.attr("main_thread")());
    const std::function<void()> check = is_main ? &check_signals : [] {};
    py::gil_scoped_release release;
    return list_folder(folder, suffixes, threads, check);
  });

#ifdef DEIT_FAST_WITH_CUDA
  module.attr("with_cuda") = true;
  module.def(
      "decode_records_cuda",
      [](const RecordLayout& layout, uintptr_t records, int64_t count,
         const std::vector<uintptr_t>& addresses, int device, uintptr_t stream) {
        cuda_decode_records(layout, at<const unsigned char>(records), count, outputs(addresses),
                            device, at<void>(stream));
      },
      Release());
  module.def(
      "encode_topk_cuda",
      [](uint32_t num_classes, uint32_t k, uint32_t id_bytes,
         const std::vector<double>& inverse_temperatures, uintptr_t logits, int dtype,
         int64_t count, uintptr_t records, uintptr_t first_bad, int device, uintptr_t stream) {
        const TopKShape shape = topk_shape(num_classes, k, id_bytes, inverse_temperatures);
        cuda_encode_topk(shape, at<const void>(logits), static_cast<FloatType>(dtype), count,
                         at<unsigned char>(records), at<int64_t>(first_bad), device,
                         at<void>(stream));
      },
      Release());
#else
  module.attr("with_cuda") = false;
#endif
}
