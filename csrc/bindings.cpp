// Python module deit_fast._C. Addresses and sizes cross as integers: the Python side has checked
// dtype, shape, contiguity and device before it passes them. The GIL is released around all work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "crc32c.h"
#include "logit_cache.h"

#ifdef DEIT_FAST_WITH_CUDA
#include "cuda/gather.h"
#endif

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
                   uint32_t id_limit, const py::bytes& manifest_sha256) {
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
  std::memcpy(spec.manifest_sha256.data(), digest.data(), digest.size());
  spec.check();
  return spec;
}

// OSError(errno, text, file name): Python picks FileNotFoundError and the like by the errno.
void raise_os_error(const IoError& error) {
  const std::string text = std::string(std::strerror(error.code)) + " (" + error.note + ")";
  PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code, text, error.path).ptr());
}

// The first block that is not complete, or None; throws where the table itself is damaged.
py::object first_incomplete(const ViewFile& file) {
  std::vector<BlockState> states;
  {
    py::gil_scoped_release release;
    states = file.table_states();
  }
  py::object first = py::none();
  for (size_t block = 0; block < states.size(); ++block) {
    if (states[block] == BlockState::broken) {
      std::string why;
      file.check_block(block, &why);
      throw FormatError(why);
    }
    if (states[block] == BlockState::pending && first.is_none()) first = py::int_(block);
  }
  return first;
}

py::tuple check_block(const ViewFile& file, uint64_t block) {
  std::string why;
  BlockState state;
  {
    py::gil_scoped_release release;
    state = file.check_block(block, &why);
  }
  return py::make_tuple(state, why);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "File format of the teacher-logit cache; use it through deit_fast.cache.";

  py::register_exception<FormatError>(module, "FormatError", PyExc_ValueError);
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const IoError& error) {
      raise_os_error(error);
    }
  });

  const auto bind_crc = [&](const char* name, uint32_t (*function)(const void*, size_t, uint32_t)) {
    module.def(
        name,
        [function](const py::bytes& data, uint32_t crc) {
          const std::string_view view = data;
          py::gil_scoped_release release;
          return function(view.data(), view.size(), crc);
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
           py::arg("id_bytes"), py::arg("id_limit"), py::arg("manifest_sha256"))
      .def_property_readonly("blocks", &ViewSpec::blocks)
      .def_property_readonly("file_bytes", &ViewSpec::file_bytes)
      .def_property_readonly("data_offset", &ViewSpec::data_offset);

  py::enum_<BlockState>(module, "BlockState")
      .value("pending", BlockState::pending)
      .value("complete", BlockState::complete)
      .value("broken", BlockState::broken);

  py::class_<ViewFile>(module, "ViewFile")
      .def(py::init([](const std::string& path, const ViewSpec& spec) {
             return std::make_unique<ViewFile>(path, spec, false);
           }),
           py::arg("path"), py::arg("spec"), Release())
      .def_property_readonly("path", &ViewFile::path)
      .def("table_states", &ViewFile::table_states, Release())
      .def("first_incomplete", &first_incomplete)
      .def("check_block", &check_block, py::arg("block"));

  py::class_<ViewWriter, ViewFile>(module, "ViewWriter")
      .def(py::init<const std::string&, const std::string&, const ViewSpec&>(), py::arg("path"),
           py::arg("temporary"), py::arg("spec"), Release())
      .def(
          "commit",
          [](ViewWriter& writer, uint64_t block, uintptr_t data, size_t size) {
            writer.commit(block, at<const void>(data), size);
          },
          py::arg("block"), py::arg("data"), py::arg("size"), Release())
      .def("sync", &ViewWriter::sync, Release());

  py::class_<ViewReader, ViewFile>(module, "ViewReader")
      .def(py::init<const std::string&, const ViewSpec&>(), py::arg("path"), py::arg("spec"),
           Release())
      .def(
          "read",
          [](const ViewReader& reader, uint64_t start, uint64_t stop, uintptr_t out) {
            reader.read(start, stop, at<void>(out));
          },
          py::arg("start"), py::arg("stop"), py::arg("out"), Release());

  module.def(
      "distinct",
      [](uintptr_t ids, size_t count, uintptr_t which) {
        return ViewReader::distinct(at<const int64_t>(ids), count, at<int64_t>(which));
      },
      py::arg("ids"), py::arg("count"), py::arg("which"), Release());
  module.def(
      "gather",
      [](const std::vector<const ViewReader*>& views, uintptr_t which, uintptr_t rows,
         size_t count, uintptr_t out, size_t record_bytes) {
        ViewReader::gather(views, at<const int64_t>(which), at<const int64_t>(rows), count,
                           at<void>(out), record_bytes);
      },
      py::arg("views"), py::arg("which"), py::arg("rows"), py::arg("count"), py::arg("out"),
      py::arg("record_bytes"), Release());

#ifdef DEIT_FAST_WITH_CUDA
  module.attr("with_cuda") = true;
  module.def(
      "gather_cuda",
      [](uintptr_t records, int64_t num_records, int64_t record_bytes, uintptr_t rows,
         int64_t count, uintptr_t out, int device, uintptr_t stream) {
        gather_records(at<const void>(records), num_records, record_bytes, at<const int64_t>(rows),
                       count, at<void>(out), device, at<void>(stream));
      },
      py::arg("records"), py::arg("num_records"), py::arg("record_bytes"), py::arg("rows"),
      py::arg("count"), py::arg("out"), py::arg("device"), py::arg("stream"), Release());
#else
  module.attr("with_cuda") = false;
#endif
}
