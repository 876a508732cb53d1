// Streams, events, graphs. Work waits in its stream's queue until somebody waits for it, as late as CUDA allows: what
// reads a result without waiting finds that it is not there yet.
#include <chrono>
#include <deque>
#include <unordered_map>
#include <utility>

#include "driver.h"

namespace emu {

enum { kGlobal, kThreadLocal, kRelaxed };  // modes of a capture

using StreamRef = std::shared_ptr<Stream>;

using Places = std::vector<std::pair<StreamRef, uint64_t>>;

struct Item {
  Work work;
  Places after;  // streams, and how far they must be
};

struct Stream {
  bool blocking = true;  // waits for the default stream, which waits for it
  uint64_t issued = 0, done = 0;
  std::deque<Item> queue;
  std::shared_ptr<Graph> capture;
  int mode = kRelaxed;
  bool broken = false;  // the capture is
};

struct Graph {
  std::vector<Task> tasks;
};

struct Event {
  StreamRef stream;  // where it was recorded last, and at which place
  uint64_t position = 0;
  std::shared_ptr<double> time;
};

template <class T>
using Handles = std::unordered_map<void*, std::shared_ptr<T>>;
static Handles<Stream>& streams = *new Handles<Stream>;
static Handles<Graph>& graphs = *new Handles<Graph>;
static Handles<Event>& events = *new Handles<Event>;
static const StreamRef& legacy = *new StreamRef(std::make_shared<Stream>());

template <class T>
static std::shared_ptr<T> find(Handles<T>& handles, void* handle) {
  auto found = handles.find(handle);
  return found == handles.end() ? nullptr : found->second;
}

template <class T>
static void* keep(Handles<T>& handles, std::shared_ptr<T> made) {
  void* handle = made.get();
  handles[handle] = std::move(made);
  return handle;
}

static StreamRef stream_of(void* handle) {
  return !handle || handle == (void*)1 ? legacy : find(streams, handle);
}

static Error no_stream() { return refuse(kInvalidHandle, "no such stream, or it was destroyed"); }

// Does what a stream holds up to a place in it.
static void advance(Stream& stream, uint64_t position) {
  while (stream.done < position && !faulted()) {
    Item item = std::move(stream.queue.front());
    stream.queue.pop_front();
    for (auto& [other, place] : item.after) advance(*other, place);
    if (!faulted()) item.work();
    ++stream.done;
  }
}

static void queue(const StreamRef& stream, Work work, Places after = {}) {
  Item item{std::move(work), std::move(after)};
  if (stream == legacy) {
    for (auto& [_, other] : streams)
      if (other->blocking && !other->capture) item.after.push_back({other, other->issued});
  } else if (stream->blocking) {
    item.after.push_back({legacy, legacy->issued});
  }
  stream->queue.push_back(std::move(item));
  ++stream->issued;
}

static Error break_capture(Stream& stream, Error code, const std::string& what) {
  stream.broken = true;
  return refuse(code, what);
}

// The default stream waits for all blocking streams, which one that is captured cannot answer.
static Error demand_no_capture_behind(const StreamRef& stream) {
  if (stream != legacy) return kSuccess;
  for (auto& [_, other] : streams)
    if (other->capture && other->blocking)
      return break_capture(*other, kCaptureImplicit, "the default stream is used while another one is captured");
  return kSuccess;
}

Error unsafe(const char* call) {
  for (auto& [_, stream] : streams)
    if (stream->capture && stream->mode != kRelaxed)
      return break_capture(*stream, kCaptureUnsupported, std::string(call) + " while a stream is captured");
  return kSuccess;
}

Error issue(void* handle, Task task) {
  if (Error code = faulted()) return code;
  StreamRef stream = stream_of(handle);
  if (!stream) return no_stream();
  if (Error code = demand_no_capture_behind(stream)) return code;
  if (stream->broken) return refuse(kCaptureInvalidated, "the capture of this stream has failed before");
  if (stream->capture) stream->capture->tasks.push_back(std::move(task));
  else queue(stream, task());
  return kSuccess;
}

static Error demand_not_captured(Stream& stream, const char* what) {
  if (!stream.capture) return kSuccess;
  return break_capture(stream, kCaptureUnsupported, std::string(what) + " a stream that is captured");
}

Error wait(void* handle) {
  StreamRef stream = stream_of(handle);
  if (!stream) return no_stream();
  if (Error code = demand_not_captured(*stream, "waiting for")) return code;
  if (Error code = demand_no_capture_behind(stream)) return code;
  if (stream == legacy) queue(stream, [] {});  // comes after all of the others
  advance(*stream, stream->issued);
  return faulted();
}

Error wait_all() {
  for (auto& [_, stream] : streams)
    if (Error code = demand_not_captured(*stream, "waiting for")) return code;
  finish();
  return faulted();
}

void finish() {
  for (auto& [_, stream] : streams) advance(*stream, stream->issued);
  advance(*legacy, legacy->issued);
}

void drop_work() {
  auto drop = [](Stream& stream) { stream.queue.clear(), stream.done = stream.issued; };
  for (auto& [_, stream] : streams) drop(*stream);
  drop(*legacy);
}

Error stream_create(void** handle, bool blocking) {
  auto stream = std::make_shared<Stream>();
  stream->blocking = blocking;
  *handle = keep(streams, std::move(stream));
  return kSuccess;
}

Error stream_destroy(void* handle) {
  StreamRef stream = find(streams, handle);
  if (!stream) return no_stream();
  advance(*stream, stream->issued);
  streams.erase(handle);
  return kSuccess;
}

// Asking goes on with the work, so that asking again and again ends.
static Error query(Stream& stream, uint64_t position) {
  if (stream.done < position) {
    advance(stream, stream.done + 1);
    return faulted() ? faulted() : kNotReady;
  }
  return faulted();
}

Error stream_query(void* handle) {
  StreamRef stream = stream_of(handle);
  if (!stream) return no_stream();
  if (Error code = demand_not_captured(*stream, "asking for")) return code;
  return query(*stream, stream->issued);
}

Error stream_capturing(void* handle, int* status) {
  StreamRef stream = stream_of(handle);
  if (!stream) return no_stream();
  *status = !stream->capture ? 0 : stream->broken ? 2 : 1;
  return kSuccess;
}

Error capture_begin(void* handle, int mode) {
  if (Error code = faulted()) return code;
  StreamRef stream = stream_of(handle);
  if (!stream) return no_stream();
  if (stream == legacy) return refuse(kCaptureUnsupported, "the default stream cannot be captured");
  if (stream->capture) return refuse(kIllegalState, "the stream is captured already");
  stream->capture = std::make_shared<Graph>();
  stream->mode = mode;
  stream->broken = false;
  return kSuccess;
}

Error capture_end(void* handle, void** graph) {
  *graph = nullptr;
  StreamRef stream = stream_of(handle);
  if (!stream) return no_stream();
  if (!stream->capture) return refuse(kIllegalState, "the stream is not captured");
  std::shared_ptr<Graph> captured = std::move(stream->capture);
  stream->capture = nullptr;
  if (std::exchange(stream->broken, false)) return kCaptureInvalidated;
  *graph = keep(graphs, std::move(captured));
  return kSuccess;
}

static Error no_graph() { return refuse(kInvalidHandle, "no such graph, or it was destroyed"); }

Error graph_instantiate(void** executable, void* handle) {
  std::shared_ptr<Graph> graph = find(graphs, handle);
  if (!graph) return no_graph();
  *executable = keep(graphs, std::make_shared<Graph>(*graph));
  return kSuccess;
}

Error graph_launch(void* executable, void* stream) {
  std::shared_ptr<Graph> graph = find(graphs, executable);
  if (!graph) return no_graph();
  for (const Task& task : graph->tasks)
    if (Error code = issue(stream, task)) return code;
  return kSuccess;
}

Error graph_destroy(void* handle) { return graphs.erase(handle) ? kSuccess : no_graph(); }

static Error no_event() { return refuse(kInvalidHandle, "no such event, or it was destroyed"); }

Error event_create(void** handle) {
  *handle = keep(events, std::make_shared<Event>());
  return kSuccess;
}

Error event_destroy(void* handle) { return events.erase(handle) ? kSuccess : no_event(); }

Error event_record(void* handle, void* stream_handle) {
  std::shared_ptr<Event> event = find(events, handle);
  if (!event) return no_event();
  StreamRef stream = stream_of(stream_handle);
  if (!stream) return no_stream();
  if (Error code = demand_not_captured(*stream, "recording an event, which is not emulated, in")) return code;
  event->time = std::make_shared<double>(0);
  Error code = issue(stream_handle, [time = event->time]() -> Work {
    return [time] {
      using namespace std::chrono;
      *time = duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
    };
  });
  if (code) return code;
  event->stream = stream;
  event->position = stream->issued;
  return kSuccess;
}

Error event_wait(void* handle) {
  std::shared_ptr<Event> event = find(events, handle);
  if (!event) return no_event();
  if (event->stream) advance(*event->stream, event->position);
  return faulted();
}

Error event_query(void* handle) {
  std::shared_ptr<Event> event = find(events, handle);
  if (!event) return no_event();
  return event->stream ? query(*event->stream, event->position) : faulted();
}

Error event_elapsed(float* milliseconds, void* begin, void* end) {
  std::shared_ptr<Event> from = find(events, begin), to = find(events, end);
  if (!from || !to) return no_event();
  if (!from->stream || !to->stream) return refuse(kInvalidHandle, "the time of an event that was never recorded");
  if (from->stream->done < from->position || to->stream->done < to->position) return kNotReady;
  *milliseconds = float(*to->time - *from->time);
  return faulted();
}

Error stream_wait_event(void* stream_handle, void* handle) {
  std::shared_ptr<Event> event = find(events, handle);
  if (!event) return no_event();
  StreamRef stream = stream_of(stream_handle);
  if (!stream) return no_stream();
  if (Error code = demand_not_captured(*stream, "waiting for an event, which is not emulated, in")) return code;
  if (event->stream) queue(stream, [] {}, {{event->stream, event->position}});
  return kSuccess;
}

}  // namespace emu
