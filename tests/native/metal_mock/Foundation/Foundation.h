// Foundation.h: what runtime.mm uses of Apple's Foundation, for GNU's Objective-C runtime; metal_mock.mm implements it

#pragma once

#include <objc/objc.h>
#include <objc/runtime.h>

#include <cstdint>

typedef unsigned long NSUInteger;

@protocol NSObject
- (id)retain;
- (oneway void)release;
- (id)autorelease;
- (NSUInteger)retainCount;
- (BOOL)conformsToProtocol:(Protocol *)protocol;
- (BOOL)respondsToSelector:(SEL)selector;
@end

__attribute__((objc_root_class))
@interface NSObject <NSObject> {
  @public
    Class isa;
    int   references;
}
+ (id)alloc;
+ (Class)class;
- (id)init;
- (void)dealloc;
@end

@interface NSAutoreleasePool : NSObject
- (void)drain;
@end

@interface NSString : NSObject {
    char * text;
}
+ (NSString *)stringWithUTF8String:(const char *)text;
- (const char *)UTF8String;
@end

@interface NSURL : NSObject {
    NSString * path;
}
+ (NSURL *)fileURLWithPath:(NSString *)path;
- (const char *)fileSystemRepresentation;
@end

@interface NSError : NSObject {
    NSString * text;
}
- (NSString *)localizedDescription;
@end
