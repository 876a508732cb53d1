// Modules of machine code: what NVIDIA's container holds is checked as a driver would, and what it holds for this GPU is
// looked up among the kernels that were made known, by content and name. Launches check what hardware checks.
#include <elf.h>

#include <cstring>
#include <unordered_map>

#include "driver.h"

namespace emu {

// A kernel's entry for the CPU, and the sizes of its parameters in order.
struct Resolved {
  EmuEntry entry;
  int max_threads, parameter_count;
  int parameter_bytes[64];
};
// Asked for each kernel, once a module: 0, or 1 with the reason in `error`.
typedef int (*Resolver)(uint64_t image, const char* name, Resolved* out, char* error, size_t error_bytes);
static Resolver resolver;

struct Function {
  std::string name;
  Resolved known;
  int registers = 0, static_bytes = 0, dynamic_limit = 0;
};

struct Module {
  uint64_t key = 0;
  const char* code = nullptr;  // machine code for this GPU, or null
  std::string ptx;
  std::vector<char> image;
  std::unordered_map<std::string, std::shared_ptr<Function>> functions;
};

static auto& modules = *new std::unordered_map<void*, std::shared_ptr<Module>>;
static auto& functions = *new std::unordered_map<void*, std::shared_ptr<Function>>;
static auto& launched = *new std::unordered_map<std::string, uint64_t>;
static uint64_t launches;

struct FatHeader {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes;
};
struct FatEntry {
  uint16_t kind, version;
  uint32_t header_bytes;
  uint64_t bytes;
  uint32_t compressed, options;
  uint16_t minor, major;
  uint32_t arch;
};
constexpr uint32_t kMagic = 0xBA55ED50;
enum { kPtx = 1, kElf = 2 };

static uint64_t hash(const char* data, size_t bytes) {  // FNV-1a
  uint64_t value = 0xcbf29ce484222325ull;
  for (size_t i = 0; i < bytes; ++i) value = (value ^ uint8_t(data[i])) * 0x100000001b3ull;
  return value;
}

// Machine code runs on GPUs of its own major number, from its minor number on; PTX on all later ones.
static bool runs(uint32_t arch) { return int(arch) / 10 == device.major && int(arch) % 10 <= device.minor; }
static bool translates(uint32_t arch) { return int(arch) <= 10 * device.major + device.minor; }

Error load_module(void** handle, const void* image) {
  if (Error code = faulted()) return code;
  if (Error code = unsafe("loading a module")) return code;
  FatHeader header;
  memcpy(&header, image, sizeof header);
  if (header.magic != kMagic || header.version != 1 || header.header_bytes != sizeof header)
    return refuse(kInvalidImage, "the module is no fatbin");
  auto module = std::make_shared<Module>();
  module->image.assign((const char*)image, (const char*)image + sizeof header + header.bytes);
  module->key = hash(module->image.data(), module->image.size());
  std::string has;
  uint32_t best = 0;
  const char *at = module->image.data() + sizeof header, *end = at + header.bytes;
  while (at < end) {
    FatEntry entry;
    if (at + sizeof entry > end) return refuse(kInvalidImage, "the fatbin ends in the middle of an entry");
    memcpy(&entry, at, sizeof entry);
    const char* content = at + entry.header_bytes;
    if (entry.header_bytes < 64 || entry.bytes > uint64_t(end - at) || content + entry.bytes > end)
      return refuse(kInvalidImage, "the fatbin ends in the middle of an entry");
    has += (has.empty() ? "" : ", ") + std::string(entry.kind == kElf ? "sm_" : "PTX of compute_") +
           std::to_string(entry.arch);
    if (entry.compressed) return refuse(kNotSupported, "a compressed fatbin, which is not emulated");
    if (entry.kind == kElf && runs(entry.arch) && entry.arch > best) {
      if (entry.bytes < sizeof(Elf64_Ehdr) || memcmp(content, ELFMAG, SELFMAG))
        return refuse(kInvalidImage, "the fatbin's machine code is no ELF file");
      module->code = content, best = entry.arch;
    }
    if (entry.kind == kPtx && translates(entry.arch)) module->ptx.assign(content, strnlen(content, entry.bytes));
    at = content + entry.bytes;
  }
  if (!module->code && module->ptx.empty())
    return refuse(kNoBinaryForGpu, "the module has code for " + has + ", and none that sm_" +
                                       std::to_string(device.major) + std::to_string(device.minor) + " runs");
  *handle = module.get();
  modules[*handle] = module;
  return kSuccess;
}

Error unload_module(void* handle) {
  auto found = modules.find(handle);
  if (found == modules.end()) return refuse(kInvalidHandle, "no such module, or it was unloaded");
  for (auto& [_, function] : found->second->functions) functions.erase(function.get());
  modules.erase(found);
  return kSuccess;
}

// What ptxas says of a kernel, in the ELF file: false if there is none of this name.
static bool read_elf(const char* file, const std::string& name, Function* out) {
  Elf64_Ehdr header;
  memcpy(&header, file, sizeof header);
  std::vector<Elf64_Shdr> sections(header.e_shnum);
  memcpy(sections.data(), file + header.e_shoff, sections.size() * sizeof(Elf64_Shdr));
  bool found = false;
  for (const Elf64_Shdr& section : sections) {
    const char* title = file + sections[header.e_shstrndx].sh_offset + section.sh_name;
    if (".nv.shared." + name == title) out->static_bytes = int(section.sh_size);
    if (".text." + name == title) out->registers = int(section.sh_info >> 24);
    if (section.sh_type != SHT_SYMTAB) continue;
    for (size_t i = 0; i < section.sh_size / sizeof(Elf64_Sym); ++i) {
      Elf64_Sym symbol;
      memcpy(&symbol, file + section.sh_offset + i * sizeof symbol, sizeof symbol);
      const char* text = file + sections[section.sh_link].sh_offset + symbol.st_name;
      found |= ELF64_ST_TYPE(symbol.st_info) == STT_FUNC && name == text;
    }
  }
  return found;
}

Error find_function(void** handle, void* module_handle, const char* name) {
  std::shared_ptr<Module> module;
  {
    std::lock_guard<std::recursive_mutex> call(one_call);
    if (Error code = faulted()) return code;
    auto found = modules.find(module_handle);
    if (found == modules.end()) return refuse(kInvalidHandle, "no such module, or it was unloaded");
    module = found->second;
    auto known = module->functions.find(name);
    if (known != module->functions.end()) return *handle = known->second.get(), kSuccess;
  }
  auto function = std::make_shared<Function>();
  function->name = name;
  bool has = module->code ? read_elf(module->code, name, function.get())
                          : module->ptx.find(".entry " + function->name + "(") != std::string::npos;
  char error[4096] = "nobody has made kernels known";
  // Python answers: a thread that waits for it must not hold what another one needs to go on.
  bool failed = has && (!resolver || resolver(module->key, name, &function->known, error, sizeof error));
  std::lock_guard<std::recursive_mutex> call(one_call);
  if (!has) return refuse(kNotFound, "the module has no kernel " + function->name);
  if (failed) return refuse(kInvalidSource, "kernel " + function->name + " cannot be emulated: " + error);
  function->dynamic_limit = (48 << 10) - function->static_bytes;
  *handle = function.get();
  functions[*handle] = module->functions[name] = function;
  return kSuccess;
}

static std::shared_ptr<Function> function_of(void* handle) {
  auto found = functions.find(handle);
  return found == functions.end() ? nullptr : found->second;
}

Error set_dynamic_limit(void* handle, int bytes) {
  auto function = function_of(handle);
  if (!function) return refuse(kInvalidHandle, "no such kernel, or its module was unloaded");
  if (bytes < 0 || bytes + function->static_bytes > device.shared_opt_in)
    return refuse(kInvalidValue, function->name + ": " + std::to_string(bytes) + " bytes of dynamic shared memory beside " +
                                     std::to_string(function->static_bytes) + " of static; a block may have " +
                                     std::to_string(device.shared_opt_in));
  function->dynamic_limit = bytes;
  return kSuccess;
}

static std::string sizes(const unsigned (&n)[3]) {
  return "(" + std::to_string(n[0]) + ", " + std::to_string(n[1]) + ", " + std::to_string(n[2]) + ")";
}

static Error demand_launchable(const LaunchConfig& config, const Function& function) {
  static const unsigned most_blocks[] = {2147483647, 65535, 65535}, most_threads[] = {1024, 1024, 64};
  for (int i = 0; i < 3; ++i) {
    if (!config.grid[i] || config.grid[i] > most_blocks[i])
      return refuse(kInvalidValue, function.name + ": a grid of " + sizes(config.grid) + " blocks");
    if (!config.block[i] || config.block[i] > most_threads[i])
      return refuse(kInvalidValue, function.name + ": a block of " + sizes(config.block) + " threads");
  }
  uint64_t threads = uint64_t(config.block[0]) * config.block[1] * config.block[2];
  if (threads > 1024 || (function.known.max_threads && threads > uint64_t(function.known.max_threads)))
    return refuse(kInvalidValue, function.name + ": a block of " + sizes(config.block) + " threads, compiled for " +
                                     std::to_string(function.known.max_threads));
  if (function.registers * ((threads + 31) / 32 * 32) > 65536)
    return refuse(kOutOfResources, function.name + ": " + std::to_string(threads) + " threads of " +
                                       std::to_string(function.registers) + " registers each");
  if (int64_t(config.shared_bytes) > function.dynamic_limit)
    return refuse(kInvalidValue, function.name + ": " + std::to_string(config.shared_bytes) +
                                     " bytes of dynamic shared memory, where " +
                                     std::to_string(function.dynamic_limit) + " were asked for");
  if (config.attribute_count) return refuse(kNotSupported, function.name + ": launch attributes are not emulated");
  return kSuccess;
}

static void run(const LaunchConfig& config, const Function& function, std::vector<uint64_t> values) {
  std::vector<void*> arguments;
  for (uint64_t& value : values) arguments.push_back(&value);
  const std::vector<uint64_t>& buffers = allocations();
  EmuLaunch launch{};
  launch.entry = function.known.entry;
  launch.arguments = arguments.data();
  memcpy(launch.grid, config.grid, sizeof launch.grid);
  memcpy(launch.block, config.block, sizeof launch.block);
  launch.dynamic_bytes = config.shared_bytes;
  launch.seed = device.seed + launches++;
  launch.max_threads = function.known.max_threads;
  launch.buffers = buffers.data();
  launch.buffer_count = int(buffers.size() / 2);
  launch.name = function.name.c_str();
  launch.describe = describe;
  static char error[4096];
  ++launched[function.name];
  Opened access;
  if (emu_launch(&launch, error, sizeof error)) fault(kIllegalAddress, error);
}

Error launch(const LaunchConfig& config, void* handle, void** arguments) {
  if (Error code = faulted()) return code;
  auto function = function_of(handle);
  if (!function) return refuse(kInvalidHandle, "no such kernel, or its module was unloaded");
  if (Error code = demand_launchable(config, *function)) return code;
  std::vector<uint64_t> values(function->known.parameter_count);
  for (size_t i = 0; i < values.size(); ++i) memcpy(&values[i], arguments[i], function->known.parameter_bytes[i]);
  return issue(config.stream, [=]() -> Work { return [=] { run(config, *function, values); }; });
}

}  // namespace emu

using namespace emu;

EMU_API void emu_driver_resolver(Resolver one) { resolver = one; }
EMU_API uint64_t emu_driver_key(const char* image, size_t bytes) { return hash(image, bytes); }
// How often kernels have run, all of them or those of a name.
EMU_API uint64_t emu_driver_launches(const char* name) { return name ? launched[name] : launches; }
EMU_API int emu_driver_registers(void* function) { return function_of(function)->registers; }
