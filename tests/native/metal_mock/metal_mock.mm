// metal_mock.mm: see metal_mock.h

#include "metal_mock.h"

#include "../metal_emulation.h"
#include "gpu/attn-args.h"
#include "metal_mock_internal.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <unistd.h>

namespace {

struct command_state;

struct queue_state {
    bool                         is_stock = false;
    size_t                       max      = 64;
    std::deque<command_state *>  pending; // committed, in order
};

struct event_state {
    uint64_t value = 0;
};

struct buffer_state {
    uint8_t * memory  = nullptr;
    size_t    size    = 0;
    uint64_t  address = 0;
    bool      owned   = false;
    bool      stale   = false; // its pages are somebody else's by now
};

struct dispatch_state {
    std::string              function;
    std::map<int, int>       constants;
    std::vector<uint8_t>     args;
    int                      grid[3];
    int                      threads;
    int                      threadgroup_bytes;
    std::set<buffer_state *> used;
};

struct op {
    enum kind { wait, signal, host, dispatch } what;
    std::shared_ptr<event_state>    event;
    uint64_t                        value = 0;
    std::function<bool()>           work;
    std::shared_ptr<dispatch_state> to_run;
};

struct command_state {
    id                           object = nil; // retained while pending
    std::shared_ptr<queue_state> queue;
    std::vector<op>              ops;
    size_t                       next   = 0;
    MTLCommandBufferStatus       status = MTLCommandBufferStatusNotEnqueued;
    std::string                  error;
    bool                         encoding = false;
    std::vector<id>              retained;
    std::shared_ptr<std::set<buffer_state *>> used;
};

struct gpu_state {
    std::recursive_mutex                      mutex;
    metal_mock::order                         order = metal_mock::order::ours_late;
    metal_mock::properties                    device;
    int                                       calls[(int) metal_mock::call::count]   = {};
    int                                       fail_at[(int) metal_mock::call::count] = {};
    std::vector<std::string>                  violations;
    int                                       n_objects    = 0;
    int                                       n_host_waits = 0;
    uint64_t                                  next_address = 0x5100000000000000;
    std::vector<std::weak_ptr<queue_state>>   queues;
    std::vector<buffer_state *>               buffers;
    bool                                      running_early = false;
};

gpu_state & gpu() {
    static auto * the = new gpu_state();
    return *the;
}

using guard = std::lock_guard<std::recursive_mutex>;

void violation(const std::string & what) {
    fprintf(stderr, "Metal mock: %s\n", what.c_str());
    gpu().violations.push_back(what);
    if (getenv("METAL_MOCK_STRICT") != nullptr) { // a process whose tests know nothing of the mock
        abort();
    }
}

bool fails(metal_mock::call what) {
    guard lock(gpu().mutex);
    gpu().calls[(int) what]++;
    int & at = gpu().fail_at[(int) what];
    return at > 0 && --at == 0;
}

//
// running
//

// host memory of an address, 0 for 0; throws where a GPU would fault
uint64_t translate(const dispatch_state & d, uint64_t address, const char * what) {
    if (address == 0) {
        return 0;
    }
    for (buffer_state * b : gpu().buffers) {
        if (address >= b->address && address < b->address + b->size) {
            if (d.used.count(b) == 0) {
                throw std::string("its ") + what + " lies in a resource that the encoder was not told of";
            }
            if (b->stale) {
                throw std::string("its ") + what + " lies in memory that was freed";
            }
            return (uint64_t) (uintptr_t) b->memory + (address - b->address);
        }
    }
    char text[32];
    snprintf(text, sizeof(text), "%#llx", (unsigned long long) address);
    throw std::string("its ") + what + " at " + text + " lies in no buffer";
}

std::string run_dispatch(const dispatch_state & d) {
    std::vector<uint8_t>  args = d.args;
    std::vector<qg_block> blocks;
    try {
        uint64_t * table = nullptr, * rows = nullptr;
        int        n_rows = 0;
        if (args.size() == sizeof(qg_attn_args)) {
            auto & a = *(qg_attn_args *) args.data();
            struct {
                uint64_t *   at;
                const char * name;
            } fields[] = { { &a.rows, "table of rows" }, { &a.tiles, "table of tiles" }, { &a.tile_rows, "rows of tiles" }, { &a.q_own, "own Q" },
                           { &a.q_leader, "leader's Q" }, { &a.dst, "result" }, { &a.scores, "scores" }, { &a.vis_bias, "bias" }, { &a.partial, "workspace" }, { &a.v_limits, "limits" } };
            for (auto & field : fields) {
                *field.at = translate(d, *field.at, field.name);
            }
            table  = &a.blocks;
            rows   = &a.rows;
            n_rows = a.n_rows;
        } else {
            auto & a = *(qg_append_args *) args.data();
            a.rows   = translate(d, a.rows, "table of rows");
            a.k      = translate(d, a.k, "K");
            a.v      = translate(d, a.v, "V");
            table    = &a.blocks;
            rows     = &a.rows;
            n_rows   = a.n_rows;
        }
        const auto * given = (const qg_block *) translate(d, *table, "table of blocks");
        int          n     = 0;
        for (int i = 0; i < n_rows; i++) {
            const qg_row & row = ((const qg_row *) *rows)[i];
            n                  = std::max({ n, row.first_block + row.n_blocks, row.block + 1 });
        }
        blocks.assign(given, given + n);
        for (auto & block : blocks) {
            block.data = translate(d, block.data, "block of KV");
        }
        *table = (uint64_t) (uintptr_t) blocks.data();
    } catch (const std::string & what) {
        violation(d.function + ": " + what);
        return what;
    }
    std::string error;
    if (!metal_emulate(d.function.c_str(), d.constants, d.grid, d.threads, d.threadgroup_bytes, args.data(), args.size(), error)) {
        violation(d.function + ": " + error);
        return error;
    }
    return "";
}

void finish(queue_state & q, command_state & c, const std::string & error) {
    c.error  = error;
    c.status = error.empty() ? MTLCommandBufferStatusCompleted : MTLCommandBufferStatusError;
    q.pending.pop_front();
    for (id object : c.retained) {
        [object release];
    }
    c.retained.clear();
    [c.object release]; // may be its end
}

// one more operation of a queue; false: it has none, or waits
bool step(queue_state & q) {
    if (q.pending.empty()) {
        return false;
    }
    command_state & c = *q.pending.front();
    if (c.next == c.ops.size()) {
        finish(q, c, "");
        return true;
    }
    op & o = c.ops[c.next];
    if (o.what == op::wait && o.event->value < o.value) {
        return false;
    }
    c.next++;
    switch (o.what) {
        case op::wait: break;
        case op::signal: o.event->value = std::max(o.event->value, o.value); break;
        case op::host:
            if (!o.work()) {
                finish(q, c, "the mock's device failed");
            }
            break;
        case op::dispatch:
            if (fails(metal_mock::call::dispatch)) {
                finish(q, c, "Caused GPU Timeout Error (injected)");
            } else if (const std::string error = run_dispatch(*o.to_run); !error.empty()) {
                finish(q, c, error);
            }
            break;
    }
    return true;
}

bool is_early(const queue_state & q) {
    return q.is_stock == (gpu().order == metal_mock::order::ours_late);
}

void run_early() {
    if (gpu().running_early) {
        return;
    }
    gpu().running_early = true;
    for (bool any = true; any;) {
        any = false;
        for (const auto & weak : gpu().queues) {
            if (const auto q = weak.lock(); q && is_early(*q)) {
                while (step(*q)) {
                    any = true;
                }
            }
        }
    }
    gpu().running_early = false;
}

// runs no more of any queue than what one step of this one takes; false: it waits for ever
bool push(queue_state & q, int depth = 0) {
    if (step(q)) {
        return true;
    }
    if (q.pending.empty() || depth > 16) {
        return false;
    }
    const op & waiting = q.pending.front()->ops[q.pending.front()->next];
    for (const auto & weak : gpu().queues) {
        const auto other = weak.lock();
        if (!other || other.get() == &q) {
            continue;
        }
        for (const command_state * c : other->pending) {
            for (size_t i = c->next; i < c->ops.size(); i++) {
                if (c->ops[i].what == op::signal && c->ops[i].event == waiting.event && c->ops[i].value >= waiting.value) {
                    return push(*other, depth + 1);
                }
            }
        }
    }
    return false;
}

void run_until_done(command_state & c) {
    guard lock(gpu().mutex);
    run_early();
    if (c.status >= MTLCommandBufferStatusCompleted) {
        return;
    }
    gpu().n_host_waits++;
    const id object = [c.object retain];
    while (c.status < MTLCommandBufferStatusCompleted) {
        if (!push(*c.queue)) {
            violation("a command buffer that nothing will ever complete is waited for");
            while (c.status < MTLCommandBufferStatusCompleted) {
                finish(*c.queue, *c.queue->pending.front(), "deadlock");
            }
        }
        run_early();
    }
    [object release];
}

} // namespace

//
// Foundation
//

namespace {
thread_local std::vector<std::vector<id> *> pools;
}

@implementation NSObject
+ (id)alloc {
    NSObject * object  = (NSObject *) class_createInstance(self, 0);
    object->references = 1;
    __atomic_fetch_add(&gpu().n_objects, 1, __ATOMIC_RELAXED);
    return object;
}
+ (Class)class {
    return self;
}
+ (id)retain {
    return self;
}
- (id)init {
    return self;
}
- (id)retain {
    if (__atomic_fetch_add(&references, 1, __ATOMIC_RELAXED) <= 0) {
        violation(std::string("a ") + object_getClassName(self) + " that is gone is retained");
    }
    return self;
}
- (oneway void)release {
    const int before = __atomic_fetch_sub(&references, 1, __ATOMIC_ACQ_REL);
    if (before <= 0) {
        violation(std::string("a ") + object_getClassName(self) + " that is gone is released");
    } else if (before == 1) {
        [self dealloc];
    }
}
- (id)autorelease {
    if (pools.empty()) {
        violation(std::string("a ") + object_getClassName(self) + " is autoreleased with no pool in place");
    } else {
        pools.back()->push_back(self);
    }
    return self;
}
- (NSUInteger)retainCount {
    return (NSUInteger) references;
}
- (void)dealloc {
    __atomic_fetch_sub(&gpu().n_objects, 1, __ATOMIC_RELAXED); // the shell stays, to tell who uses it still
}
- (BOOL)conformsToProtocol:(Protocol *)protocol {
    // by name: GNU's runtime knows no protocol of a file that has no class of it
    const std::string wanted = ((const char * const *) protocol)[1]; // after its class
    bool              found  = false;
    for (Class c = object_getClass(self); c != Nil; c = class_getSuperclass(c)) {
        unsigned    n    = 0;
        Protocol ** list = class_copyProtocolList(c, &n);
        for (unsigned i = 0; i < n; i++) {
            found = found || wanted == protocol_getName(list[i]);
        }
        free(list);
    }
    return found;
}
- (BOOL)respondsToSelector:(SEL)selector {
    return class_respondsToSelector(object_getClass(self), selector);
}
@end

@implementation NSAutoreleasePool
- (id)init {
    pools.push_back(new std::vector<id>());
    return self;
}
- (void)drain {
    std::vector<id> * mine = pools.back();
    while (!mine->empty()) {
        const id object = mine->back();
        mine->pop_back();
        [object release];
    }
    pools.pop_back();
    delete mine;
    [self release];
}
@end

@implementation NSString
+ (NSString *)stringWithUTF8String:(const char *)text {
    NSString * made = [[NSString alloc] init];
    made->text      = strdup(text);
    return [made autorelease];
}
- (const char *)UTF8String {
    return text;
}
- (void)dealloc {
    free(text);
    [super dealloc];
}
@end

@implementation NSURL
+ (NSURL *)fileURLWithPath:(NSString *)path {
    NSURL * made = [[NSURL alloc] init];
    made->path   = [path retain];
    return [made autorelease];
}
- (const char *)fileSystemRepresentation {
    return [path UTF8String];
}
- (void)dealloc {
    [path release];
    [super dealloc];
}
@end

@interface NSError (Mock)
+ (NSError *)errorWithText:(const std::string &)text;
@end

@implementation NSError
+ (NSError *)errorWithText:(const std::string &)text {
    NSError * made = [[NSError alloc] init];
    made->text     = [[NSString stringWithUTF8String:text.c_str()] retain];
    return [made autorelease];
}
- (NSString *)localizedDescription {
    return text;
}
- (void)dealloc {
    [text release];
    [super dealloc];
}
@end

//
// Metal
//

@interface MockBuffer : NSObject <MTLBuffer> {
  @public
    buffer_state * state;
}
@end

@implementation MockBuffer
- (void *)contents {
    return state->memory;
}
- (NSUInteger)length {
    return state->size;
}
- (uint64_t)gpuAddress {
    return state->address;
}
- (BOOL)respondsToSelector:(SEL)selector {
    return sel_isEqual(selector, @selector(gpuAddress)) ? (BOOL) gpu().device.addresses : [super respondsToSelector:selector];
}
- (void)dealloc {
    guard lock(gpu().mutex);
    gpu().buffers.erase(std::find(gpu().buffers.begin(), gpu().buffers.end(), state));
    if (state->owned) {
        free(state->memory);
    }
    delete state;
    state = nullptr;
    [super dealloc];
}
@end

static id<MTLBuffer> make_buffer(uint8_t * memory, size_t size, bool is_owned) {
    guard        lock(gpu().mutex);
    MockBuffer * made    = [[MockBuffer alloc] init];
    made->state          = new buffer_state();
    made->state->memory  = memory;
    made->state->size    = size;
    made->state->owned   = is_owned;
    made->state->address = gpu().next_address;
    gpu().next_address += (size / 65536 + 2) * 65536; // and a gap, so that no address past the end is another's
    gpu().buffers.push_back(made->state);
    return made;
}

@interface MockEvent : NSObject <MTLSharedEvent> {
  @public
    std::shared_ptr<event_state> * state;
}
@end

@implementation MockEvent
- (id)init {
    state = new std::shared_ptr<event_state>(std::make_shared<event_state>());
    return self;
}
- (uint64_t)signaledValue {
    return (*state)->value;
}
- (void)setSignaledValue:(uint64_t)value {
    guard lock(gpu().mutex);
    (*state)->value = value;
    run_early();
}
- (void)dealloc {
    delete state;
    state = nullptr;
    [super dealloc];
}
@end

@implementation MTLFunctionConstantValues
- (id)init {
    values = new std::map<int, int>();
    return self;
}
- (void)setConstantValue:(const void *)value type:(MTLDataType)type atIndex:(NSUInteger)index {
    if (type != MTLDataTypeInt) {
        violation("a function constant is no int");
    }
    (*(std::map<int, int> *) values)[(int) index] = *(const int *) value;
}
- (void)dealloc {
    delete (std::map<int, int> *) values;
    [super dealloc];
}
@end

@implementation MTLCompileOptions
- (id)init {
    fastMath = YES; // Metal's default
    return self;
}
- (void)setFastMathEnabled:(BOOL)enabled {
    fastMath = enabled;
}
- (void)setLanguageVersion:(MTLLanguageVersion)given {
    version = given;
}
@end

@interface MockFunction : NSObject <MTLFunction, MTLComputePipelineState> {
  @public
    std::string *        name;
    std::map<int, int> * constants;
}
@end

@implementation MockFunction
- (NSUInteger)maxTotalThreadsPerThreadgroup {
    return (NSUInteger) gpu().device.max_threads;
}
- (NSUInteger)threadExecutionWidth {
    return (NSUInteger) gpu().device.simd_width;
}
- (void)dealloc {
    delete name;
    delete constants;
    [super dealloc];
}
@end

static MockFunction * make_function(const std::string & name, const std::map<int, int> & constants) {
    MockFunction * made = [[MockFunction alloc] init];
    made->name          = new std::string(name);
    made->constants     = new std::map<int, int>(constants);
    return made;
}

@interface MockLibrary : NSObject <MTLLibrary> {
  @public
    std::string * source;
}
@end

@implementation MockLibrary
- (id<MTLFunction>)newFunctionWithName:(NSString *)name constantValues:(MTLFunctionConstantValues *)values error:(NSError **)error {
    const std::string wanted = [name UTF8String];
    if (fails(metal_mock::call::new_function) || source->find(wanted) == std::string::npos) {
        *error = [NSError errorWithText:"Function " + wanted + " was not found in the library"];
        return nil;
    }
    return make_function(wanted, *(std::map<int, int> *) values->values);
}
- (void)dealloc {
    delete source;
    [super dealloc];
}
@end

@interface MockCommands : NSObject <MockCommandBuffer> {
  @public
    command_state * state;
}
@end

@interface MockEncoder : NSObject <MTLComputeCommandEncoder> {
  @public
    MockCommands *                           commands; // retained
    MockFunction *                           pipeline;
    std::vector<uint8_t> *                   args;
    std::shared_ptr<std::set<buffer_state *>> * used;
    NSUInteger                               threadgroup_bytes;
    BOOL                                     ended, open_dispatch;
}
@end

@implementation MockEncoder
- (id)init {
    args = new std::vector<uint8_t>();
    used = new std::shared_ptr<std::set<buffer_state *>>(std::make_shared<std::set<buffer_state *>>());
    return self;
}
- (void)check:(const char *)what {
    if (ended) {
        violation(std::string(what) + " after the encoder has ended");
    }
}
- (void)setComputePipelineState:(id<MTLComputePipelineState>)state {
    [self check:"a pipeline is set"];
    pipeline = (MockFunction *) state;
    commands->state->retained.push_back([pipeline retain]);
}
- (void)setBytes:(const void *)bytes length:(NSUInteger)length atIndex:(NSUInteger)index {
    [self check:"bytes are set"];
    if (length > 4096 || index != 0 || (length != sizeof(qg_attn_args) && length != sizeof(qg_append_args))) {
        violation("setBytes of " + std::to_string(length) + " bytes at index " + std::to_string(index));
        return;
    }
    args->assign((const uint8_t *) bytes, (const uint8_t *) bytes + length);
}
- (void)setThreadgroupMemoryLength:(NSUInteger)length atIndex:(NSUInteger)index {
    [self check:"threadgroup memory is set"];
    if (length == 0 || length % 16 != 0 || length > 32 * 1024 || index != 0) {
        violation("threadgroup memory of " + std::to_string(length) + " bytes at index " + std::to_string(index));
    }
    threadgroup_bytes = length;
}
- (void)useResource:(id<MTLResource>)resource usage:(MTLResourceUsage)usage {
    [self check:"a resource is used"];
    if (resource == nil || usage != (MTLResourceUsageRead | MTLResourceUsageWrite)) {
        violation("a resource is used as nothing, or not to read and write");
        return;
    }
    // not retained: nothing says that Metal keeps what it is only told of
    (*used)->insert(((MockBuffer *) resource)->state);
}
- (void)useResources:(const id<MTLResource>[])resources count:(NSUInteger)count usage:(MTLResourceUsage)usage {
    for (NSUInteger i = 0; i < count; i++) {
        [self useResource:resources[i] usage:usage];
    }
}
- (void)memoryBarrierWithScope:(MTLBarrierScope)scope {
    [self check:"a barrier is set"];
    if (scope == MTLBarrierScopeBuffers) {
        open_dispatch = NO;
    }
}
- (void)dispatchThreadgroups:(MTLSize)grid threadsPerThreadgroup:(MTLSize)threads {
    [self check:"threadgroups are dispatched"];
    const NSUInteger n_threads = threads.width * threads.height * threads.depth;
    if (pipeline == nil || args->empty() || threadgroup_bytes == 0) {
        violation("a dispatch without a pipeline, arguments or threadgroup memory");
        return;
    }
    if (open_dispatch) {
        violation("a dispatch that no barrier keeps from the one before");
    }
    if (grid.width * grid.height * grid.depth == 0 || n_threads != threads.width || n_threads > [pipeline maxTotalThreadsPerThreadgroup]) {
        violation("a dispatch of " + std::to_string(grid.width) + " x " + std::to_string(grid.height) + " x " + std::to_string(grid.depth) +
                  " threadgroups of " + std::to_string(n_threads) + " threads");
        return;
    }
    auto d               = std::make_shared<dispatch_state>();
    d->function          = *pipeline->name;
    d->constants         = *pipeline->constants;
    d->args              = *args;
    d->grid[0]           = (int) grid.width;
    d->grid[1]           = (int) grid.height;
    d->grid[2]           = (int) grid.depth;
    d->threads           = (int) n_threads;
    d->threadgroup_bytes = (int) threadgroup_bytes;
    d->used              = **used;
    op o                 = { op::dispatch, nullptr, 0, nullptr, d };
    commands->state->ops.push_back(o);
    open_dispatch = YES;
    args->clear(); // each has its own
}
- (void)endEncoding {
    [self check:"encoding is ended"];
    ended                     = YES;
    commands->state->encoding = false;
}
- (void)dealloc {
    if (!ended) {
        violation("an encoder goes before encoding has ended");
    }
    [commands release];
    delete args;
    delete used;
    [super dealloc];
}
@end

@implementation MockCommands
- (void)check:(const char *)what {
    if (state->status != MTLCommandBufferStatusNotEnqueued) {
        violation(std::string(what) + " after the command buffer was committed");
    }
    if (state->encoding) {
        violation(std::string(what) + " while an encoder is open");
    }
}
- (id<MTLComputeCommandEncoder>)computeCommandEncoder {
    [self check:"an encoder is made"];
    if (fails(metal_mock::call::encoder)) {
        return nil;
    }
    state->encoding    = true;
    MockEncoder * made = [[MockEncoder alloc] init];
    made->commands     = [self retain];
    return [made autorelease];
}
- (void)encodeEvent:(id<MTLEvent>)event value:(uint64_t)value as:(int)what {
    [self check:"an event is encoded"];
    if (event == nil) {
        violation("no event is encoded");
        return;
    }
    state->retained.push_back([(id) event retain]);
    state->ops.push_back({ (enum op::kind) what, *((MockEvent *) event)->state, value, nullptr, nullptr });
}
- (void)encodeWaitForEvent:(id<MTLEvent>)event value:(uint64_t)value {
    [self encodeEvent:event value:value as:op::wait];
}
- (void)encodeSignalEvent:(id<MTLEvent>)event value:(uint64_t)value {
    [self encodeEvent:event value:value as:op::signal];
}
- (void)encodeHost:(const std::function<bool()> &)work {
    [self check:"work is encoded"];
    state->ops.push_back({ op::host, nullptr, 0, work, nullptr });
}
- (void)commit {
    guard lock(gpu().mutex);
    [self check:"a command buffer is committed"];
    state->status = MTLCommandBufferStatusCommitted;
    state->object = [self retain];
    state->queue->pending.push_back(state);
    run_early();
}
- (void)waitUntilCompleted {
    if (state->status == MTLCommandBufferStatusNotEnqueued) {
        violation("a command buffer that was never committed is waited for");
        return;
    }
    run_until_done(*state);
}
- (MTLCommandBufferStatus)status {
    return state->status;
}
- (NSError *)error {
    return state->error.empty() ? nil : [NSError errorWithText:state->error];
}
- (void)dealloc {
    for (id object : state->retained) { // never committed
        [object release];
    }
    delete state;
    state = nullptr;
    [super dealloc];
}
@end

@interface MockQueue : NSObject <MTLCommandQueue> {
  @public
    std::shared_ptr<queue_state> * state;
}
@end

@implementation MockQueue
- (id)init {
    guard lock(gpu().mutex);
    state        = new std::shared_ptr<queue_state>(std::make_shared<queue_state>());
    auto & known = gpu().queues;
    known.erase(std::remove_if(known.begin(), known.end(), [](const auto & q) { return q.expired(); }), known.end());
    known.push_back(*state);
    return self;
}
- (id<MTLCommandBuffer>)commandBuffer {
    if (!(*state)->is_stock && fails(metal_mock::call::command_buffer)) {
        return nil;
    }
    guard lock(gpu().mutex);
    while ((*state)->pending.size() >= (*state)->max) { // Metal makes the host wait here
        if (!push(**state)) {
            violation("a queue is full of command buffers that nothing will complete");
            break;
        }
    }
    MockCommands * made = [[MockCommands alloc] init];
    made->state         = new command_state();
    made->state->queue  = *state;
    return [made autorelease];
}
- (void)dealloc {
    delete state;
    state = nullptr;
    [super dealloc];
}
@end

@interface MockDevice : NSObject <MTLDevice>
@end

static id<MTLLibrary> make_library(const char * source, NSError ** error) {
    if (fails(metal_mock::call::new_library)) {
        *error = [NSError errorWithText:"program_source:12:3: error: use of undeclared identifier 'x' (injected)"];
        return nil;
    }
    MockLibrary * made = [[MockLibrary alloc] init];
    made->source       = new std::string(source);
    return made;
}

@implementation MockDevice
- (NSString *)name {
    return [NSString stringWithUTF8String:gpu().device.name];
}
- (BOOL)hasUnifiedMemory {
    return gpu().device.unified;
}
- (MTLArgumentBuffersTier)argumentBuffersSupport {
    return gpu().device.tier2 ? MTLArgumentBuffersTier2 : MTLArgumentBuffersTier1;
}
- (BOOL)supportsFamily:(MTLGPUFamily)family {
    return family == MTLGPUFamilyApple7 && gpu().device.apple7;
}
- (id<MTLCommandQueue>)newCommandQueue {
    return [self newCommandQueueWithMaxCommandBufferCount:64];
}
- (id<MTLCommandQueue>)newCommandQueueWithMaxCommandBufferCount:(NSUInteger)count {
    if (fails(metal_mock::call::new_queue)) {
        return nil;
    }
    MockQueue * made    = [[MockQueue alloc] init];
    (*made->state)->max = count;
    return made;
}
- (id<MTLSharedEvent>)newSharedEvent {
    return fails(metal_mock::call::new_event) ? nil : [[MockEvent alloc] init];
}
- (id<MTLBuffer>)newBufferWithLength:(NSUInteger)length options:(MTLResourceOptions)options {
    if (length == 0 || options != MTLResourceStorageModeShared) {
        violation("a buffer of " + std::to_string(length) + " bytes with options " + std::to_string(options));
    }
    if (fails(metal_mock::call::new_buffer)) {
        return nil;
    }
    const size_t page   = (size_t) sysconf(_SC_PAGESIZE);
    auto *       memory = (uint8_t *) aligned_alloc(page, (length + page - 1) / page * page);
    memset(memory, 0xff, length); // NaN
    return make_buffer(memory, length, true);
}
- (id<MTLBuffer>)newBufferWithBytesNoCopy:(void *)bytes
                                   length:(NSUInteger)length
                                  options:(MTLResourceOptions)options
                              deallocator:(void (^)(void * bytes, NSUInteger length))deallocator {
    const size_t page = (size_t) sysconf(_SC_PAGESIZE);
    if ((uintptr_t) bytes % page != 0 || length % page != 0 || length == 0 || options != MTLResourceStorageModeShared || deallocator != nil) {
        violation("memory of " + std::to_string(length) + " bytes is mapped off its pages, or with options or a deallocator");
        return nil;
    }
    return fails(metal_mock::call::map_buffer) ? nil : make_buffer((uint8_t *) bytes, length, false);
}
- (id<MTLLibrary>)newLibraryWithSource:(NSString *)source options:(MTLCompileOptions *)options error:(NSError **)error {
    if (options == nil || options->fastMath || options->version != MTLLanguageVersion3_0) {
        violation("kernels are compiled with fast math, or as another language than Metal 3.0");
    }
    return make_library([source UTF8String], error);
}
- (id<MTLLibrary>)newLibraryWithURL:(NSURL *)url error:(NSError **)error {
    FILE * file = fopen([url fileSystemRepresentation], "rb");
    if (file == nullptr) {
        *error = [NSError errorWithText:"no such file"];
        return nil;
    }
    std::string source;
    char        chunk[4096];
    for (size_t n; (n = fread(chunk, 1, sizeof(chunk), file)) > 0;) {
        source.append(chunk, n);
    }
    fclose(file);
    return make_library(source.c_str(), error);
}
- (id<MTLComputePipelineState>)newComputePipelineStateWithFunction:(id<MTLFunction>)function error:(NSError **)error {
    MockFunction * f = (MockFunction *) function;
    if (fails(metal_mock::call::new_pipeline)) {
        *error = [NSError errorWithText:"Compiler encountered an internal error (injected)"];
        return nil;
    }
    return make_function(*f->name, *f->constants);
}
@end

id<MTLDevice> MTLCreateSystemDefaultDevice() {
    static MockDevice * the = [] {
        MockDevice * made = [[MockDevice alloc] init];
        __atomic_fetch_sub(&gpu().n_objects, 1, __ATOMIC_RELAXED);
        return made;
    }();
    return [the retain];
}

id<MTLCommandQueue> mock_new_stock_queue() {
    MockQueue * made         = [[MockQueue alloc] init];
    (*made->state)->is_stock = true;
    return made;
}

namespace metal_mock {

void set_order(order o) {
    gpu().order = o;
}

void fail(call what, int after) {
    gpu().fail_at[(int) what] = after + 1;
}

int n_calls(call what) {
    return gpu().calls[(int) what];
}

properties & device() {
    return gpu().device;
}

const std::vector<std::string> & violations() {
    return gpu().violations;
}

void clear_violations() {
    gpu().violations.clear();
}

int n_objects() {
    return gpu().n_objects;
}

int n_host_waits() {
    return gpu().n_host_waits;
}

void pages_freed(const void * pages, size_t size) {
    guard lock(gpu().mutex);
    for (buffer_state * b : gpu().buffers) {
        if (!b->owned && b->memory < (const uint8_t *) pages + size && (const uint8_t *) pages < b->memory + b->size) {
            b->stale = true;
        }
    }
}

} // namespace metal_mock

// for the Python tests
#define MOCK_API extern "C" __attribute__((visibility("default")))

MOCK_API void metal_mock_fail(int what, int after) {
    metal_mock::fail((metal_mock::call) what, after);
}

MOCK_API int metal_mock_calls(int what) {
    return metal_mock::n_calls((metal_mock::call) what);
}

MOCK_API void metal_mock_order(int ours_early) {
    metal_mock::set_order((metal_mock::order) ours_early);
}
