// Runs `main` of an artifact without Python: a .llmc file, TVM's two runtime libraries, and this.
//
//   run_artifact model.llmc NAME=FILE:DIM,DIM... [NAME=FILE:DIM,DIM...]
//
// Each FILE holds one input as raw numbers in row-major order, of the dtype that the manifest states. Every output is
// written to NAME.bin in the current folder; a line with its name, dtype and shape is printed.
//
// An artifact is a zip of stored entries, so the file is mapped once and weights are used where they lie: entries start
// at multiples of 4096 bytes, tensors at multiples of 64. One for an NVIDIA GPU has its kernels in entries of their own;
// then weights and inputs are copied to the GPU. This example verifies no hashes: the Python reader does.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/tvm_ffi.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;
namespace json = tvm::ffi::json;

struct Span {
  char* data;
  size_t size;
  std::string text() const { return std::string(data, size); }
};

template <typename T>
static T Read(const char* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

[[noreturn]] static void Fail(const std::string& what) { throw std::runtime_error(what); }

static Span MapFile(const char* path) {
  int file = open(path, O_RDONLY);
  struct stat status;
  if (file < 0 || fstat(file, &status) != 0) Fail(std::string("cannot open ") + path);
  void* data = mmap(nullptr, status.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
  if (data == MAP_FAILED) Fail(std::string("cannot map ") + path);
  close(file);
  return {static_cast<char*>(data), size_t(status.st_size)};
}

// Walks the local headers; every entry of an artifact carries its size in a zip64 field (id 1).
static std::map<std::string, Span> Entries(Span zip) {
  std::map<std::string, Span> entries;
  size_t at = 0;
  while (at + 30 < zip.size && std::memcmp(zip.data + at, "PK\3\4", 4) == 0) {
    size_t name_size = Read<uint16_t>(zip.data + at + 26), extra_size = Read<uint16_t>(zip.data + at + 28);
    size_t extra = at + 30 + name_size, start = extra + extra_size, size = 0;
    if (start > zip.size) Fail("the file is truncated");
    for (size_t field = extra; field + 4 <= start; field += 4 + Read<uint16_t>(zip.data + field + 2))
      if (Read<uint16_t>(zip.data + field) == 1) size = Read<uint64_t>(zip.data + field + 4);
    if (size > zip.size - start) Fail("the file is truncated");
    entries[std::string(zip.data + at + 30, name_size)] = {zip.data + start, size};
    at = start + size;
  }
  if (!entries.count("manifest.json") || !entries.count("lib.so")) Fail("not an artifact");
  return entries;
}

static const char kKernels[] = "cuda/kernels.json";  // an artifact for a GPU has it

// Makes kernels part of the library whose host code calls them. TVM's runtime for CUDA needs NVIDIA's, libcudart.so.13.
static void ImportKernels(const ffi::Module& library, const std::map<std::string, Span>& entries) {
  if (!dlopen("libtvm_runtime_cuda.so", RTLD_NOW | RTLD_GLOBAL)) Fail(dlerror());
  ffi::Function load = ffi::Function::GetGlobalRequired("ffi.Module.load_from_bytes.cuda");
  for (const ffi::Any& part : library->imports()) {
    ffi::Module host = part.cast<ffi::Module>();
    if (std::string(host->kind()) != "library") continue;
    for (const auto& [name, data] : entries)
      if (name.rfind("cuda/", 0) == 0 && name.size() > 9 && name.compare(name.size() - 4, 4, ".bin") == 0)
        host->ImportModule(load(ffi::Bytes(data.text())).cast<ffi::Module>());
  }
}

static ffi::Module LoadLibrary(const std::map<std::string, Span>& entries) {
  Span code = entries.at("lib.so");
  std::string path = (std::filesystem::temp_directory_path() / "llmc-XXXXXX.so").string();
  int file = mkstemps(path.data(), 3);
  if (file < 0 || write(file, code.data, code.size) != ssize_t(code.size)) Fail("cannot write a temporary file");
  close(file);
  ffi::Module library = ffi::Module::LoadFromFile(path);
  unlink(path.c_str());
  const int gpu = kDLCUDA, cpu = kDLCPU, device = 0, pooled_allocator = 2;
  bool kernels = entries.count(kKernels);
  if (kernels) ImportKernels(library, entries);
  ffi::Module machine = library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
  ffi::Function begin = machine->GetFunction("vm_initialization").value();
  if (kernels) begin(gpu, device, pooled_allocator, cpu, device, pooled_allocator);
  else begin(cpu, device, pooled_allocator);
  return machine;
}

// "Allocates" memory that lies in the mapped file already.
struct Mapped {
  char* data;
  void AllocData(DLTensor* tensor) { tensor->data = data; }
  void FreeData(DLTensor*) {}
};

struct Aligned {
  void AllocData(DLTensor* tensor) {
    if (posix_memalign(&tensor->data, 64, (ffi::GetDataSize(*tensor) + 63) / 64 * 64) != 0) throw std::bad_alloc();
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

static ffi::Tensor ToGpu(const ffi::Tensor& tensor) {
  ffi::Function allocate = ffi::Function::GetGlobalRequired("runtime.TVMTensorAllocWithScope");
  ffi::Shape shape(tensor.shape().begin(), tensor.shape().end());
  ffi::Any there = allocate(shape, tensor.dtype(), DLDevice{kDLCUDA, 0}, nullptr);
  size_t size = ffi::GetDataSize(tensor.numel(), tensor.dtype());
  if (size) ffi::Function::GetGlobalRequired("runtime.TVMTensorCopyFromBytes")(there, tensor.data_ptr(), size);
  return there.cast<ffi::Tensor>();
}

static json::Value Get(const json::Value& object, const std::string& key) {
  return object.cast<json::Object>().at(ffi::String(key));
}

static std::string Text(const json::Value& value) { return std::string(value.cast<ffi::String>()); }

static std::vector<int64_t> Numbers(const json::Value& array) {
  std::vector<int64_t> out;
  for (const ffi::Any& item : array.cast<json::Array>()) out.push_back(item.cast<int64_t>());
  return out;
}

static DLDataType DType(const json::Value& spec) { return ffi::StringToDLDataType(Text(Get(spec, "dtype"))); }

static ffi::Tensor ReadInput(const json::Value& spec, const std::map<std::string, std::string>& given) {
  auto found = given.find(Text(Get(spec, "name")));
  if (found == given.end()) Fail("no input " + Text(Get(spec, "name")));
  size_t colon = found->second.rfind(':');
  if (colon == std::string::npos) Fail("write NAME=FILE:DIM,DIM...");
  std::vector<int64_t> shape;
  for (const char* at = found->second.c_str() + colon; *at;) {
    char* end;
    shape.push_back(std::strtoll(at + 1, &end, 10));
    at = end;
  }
  ffi::Tensor tensor = ffi::Tensor::FromNDAlloc(Aligned(), ffi::Shape(shape), DType(spec), DLDevice{kDLCPU, 0});
  std::ifstream file(found->second.substr(0, colon), std::ios::binary);
  size_t size = ffi::GetDataSize(tensor.numel(), tensor.dtype());
  if (!file.read(static_cast<char*>(tensor.data_ptr()), size)) Fail(found->first + ": the file is too short");
  return tensor;
}

static void WriteOutput(const std::string& name, const ffi::Tensor& tensor) {
  std::string data(ffi::GetDataSize(tensor.numel(), tensor.dtype()), '\0');
  void* to = data.data();
  if (tensor.device().device_type == kDLCPU) std::memcpy(to, tensor.data_ptr(), data.size());
  else ffi::Function::GetGlobalRequired("runtime.TVMTensorCopyToBytes")(tensor, to, data.size());
  std::ofstream(name + ".bin", std::ios::binary) << data;
  std::cout << name << " " << std::string(ffi::DLDataTypeToString(tensor.dtype()));
  for (int64_t dim : tensor.shape()) std::cout << " " << dim;
  std::cout << "\n";
}

static void Run(int argc, char** argv) {
  std::map<std::string, std::string> given;
  for (int i = 2; i < argc; ++i) {
    std::string argument = argv[i];
    size_t equals = argument.find('=');
    if (equals == std::string::npos) Fail("write NAME=FILE:DIM,DIM...");
    given[argument.substr(0, equals)] = argument.substr(equals + 1);
  }
  std::map<std::string, Span> entries = Entries(MapFile(argv[1]));
  json::Value manifest = json::Parse(entries["manifest.json"].text());
  json::Value main = Get(Get(manifest, "functions"), "main");
  Span weights = entries["weights.safetensors"];
  size_t header = Read<uint64_t>(weights.data);
  json::Value stored = json::Parse(std::string(weights.data + 8, header));

  std::vector<ffi::Any> arguments;
  for (const ffi::Any& spec : Get(main, "inputs").cast<json::Array>()) arguments.push_back(ReadInput(spec, given));
  for (const ffi::Any& name : Get(main, "params").cast<json::Array>()) {
    json::Value param = Get(Get(manifest, "params"), Text(name));
    json::Value place = Get(stored, Text(Get(param, "tensor")));
    char* data = weights.data + 8 + header + Numbers(Get(place, "data_offsets"))[0];
    ffi::Shape shape(Numbers(Get(param, "shape")));
    arguments.push_back(ffi::Tensor::FromNDAlloc(Mapped{data}, shape, DType(param), DLDevice{kDLCPU, 0}));
  }
  ffi::Module machine = LoadLibrary(entries);
  if (entries.count(kKernels))
    for (ffi::Any& argument : arguments) argument = ToGpu(argument.cast<ffi::Tensor>());
  std::vector<ffi::AnyView> packed(arguments.begin(), arguments.end());
  ffi::Any result;
  machine->GetFunction("main").value().CallPacked(packed.data(), packed.size(), &result);

  json::Array outputs = Get(main, "outputs").cast<json::Array>();
  if (std::optional<ffi::Tensor> single = result.as<ffi::Tensor>()) {
    WriteOutput(Text(Get(outputs[0], "name")), *single);
    return;
  }
  ffi::Array<ffi::Tensor> several = result.cast<ffi::Array<ffi::Tensor>>();
  for (size_t i = 0; i < outputs.size(); ++i) WriteOutput(Text(Get(outputs[i], "name")), several[i]);
}

int main(int argc, char** argv) {
  if (argc < 2) {
    std::cerr << "usage: run_artifact model.llmc NAME=FILE:DIM,DIM...\n";
    return 2;
  }
  try {
    Run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << argv[1] << ": " << error.what() << "\n";
    return 1;
  }
}
