// The binary interface of NVIDIA's driver and runtime libraries, as far as programs here use it: numbers and layouts of
// CUDA 13. A test compares them with NVIDIA's headers where those are installed.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emu {

// The same in both libraries.
enum Error : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kInvalidDirection = 21,
  kInvalidDevice = 101,
  kInvalidImage = 200,
  kNoBinaryForGpu = 209,
  kInvalidPtx = 218,
  kInvalidSource = 300,
  kInvalidHandle = 400,
  kIllegalState = 401,
  kNotFound = 500,
  kNotReady = 600,
  kIllegalAddress = 700,
  kOutOfResources = 701,
  kLaunchFailure = 719,
  kNotPermitted = 800,
  kNotSupported = 801,
  kCaptureUnsupported = 900,
  kCaptureInvalidated = 901,
  kCaptureImplicit = 906,
};

// CUlaunchConfig
struct LaunchConfig {
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};

// cudaDeviceProp
struct DeviceProp {
  char name[256], uuid[16], luid[8];
  unsigned luid_mask;
  size_t memory, shared_per_block;
  int registers_per_block, warp;
  size_t pitch;
  int threads_per_block, block_size[3], grid_size[3];
  size_t constant_memory;
  int major, minor;
  size_t texture_alignment, texture_pitch_alignment;
  int multiprocessors, integrated, can_map_host_memory, textures_and_surfaces[38];
  size_t surface_alignment;
  int concurrent_kernels, ecc, pci[3], tcc, copy_engines, unified_addressing, bus_width, l2_bytes, persisting_l2_bytes,
      threads_per_multiprocessor, stream_priorities, l1_caches[2];
  size_t shared_per_multiprocessor;
  int registers_per_multiprocessor, managed_memory, boards[2], native_atomics, pageable_access, concurrent_managed,
      preemption, registered_memory, cooperative;
  size_t shared_opt_in;
  int host_page_tables, direct_managed, blocks_per_multiprocessor, access_window;
  size_t reserved_shared;
  int rest[75];
};

}  // namespace emu
