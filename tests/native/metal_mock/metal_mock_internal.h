// metal_mock_internal.h: what the mock of ggml's Metal device needs besides Metal's interface

#pragma once

#import <Metal/Metal.h>

#include <functional>

@protocol MockCommandBuffer <MTLCommandBuffer>
- (void)encodeHost:(const std::function<bool()> &)work; // runs on the CPU in the GPU's place; false: the command buffer fails
@end

id<MTLCommandQueue> mock_new_stock_queue(); // the one whose turn set_order() tells from the others'
