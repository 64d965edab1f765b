/* Foundation.h: of Apple's Foundation what the shim uses, declared from its public documentation; for compiling on
 * another system. BOOL, NSObject and the like come from <objc/NSObject.h>, which Darwin's open headers have. */
#ifndef ANERT_MACSTUB_FOUNDATION_H
#define ANERT_MACSTUB_FOUNDATION_H
#include <limits.h>
#include <objc/NSObject.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

@class NSArray, NSData, NSDictionary, NSError, NSString;
typedef const struct __CFString *CFStringRef;
typedef const struct __CFDictionary *CFDictionaryRef;
typedef const void *CFTypeRef;

typedef struct {
    unsigned long state;
    id *itemsPtr;
    unsigned long *mutationsPtr;
    unsigned long extra[5];
} NSFastEnumerationState;
@protocol NSFastEnumeration
- (NSUInteger)countByEnumeratingWithState:(NSFastEnumerationState *)state
                                  objects:(id __unsafe_unretained[])buffer
                                    count:(NSUInteger)n;
@end
@protocol NSCopying
@end

@interface NSString : NSObject <NSCopying>
@property(readonly) NSUInteger length;
@property(readonly) const char *UTF8String __attribute__((objc_returns_inner_pointer));
+ (instancetype)stringWithUTF8String:(const char *)text;
+ (instancetype)stringWithFormat:(NSString *)format, ... __attribute__((format(__NSString__, 1, 2)));
- (BOOL)hasPrefix:(NSString *)prefix;
- (BOOL)isEqualToString:(NSString *)other;
- (NSString *)substringFromIndex:(NSUInteger)from;
- (NSArray *)componentsSeparatedByString:(NSString *)separator;
- (NSString *)stringByAppendingPathComponent:(NSString *)name;
@property(readonly, copy) NSString *stringByDeletingLastPathComponent;
@end
@interface NSMutableString : NSString
- (void)appendString:(NSString *)text;
- (void)appendFormat:(NSString *)format, ... __attribute__((format(__NSString__, 1, 2)));
@end
@interface NSConstantString : NSString
@end

typedef enum : NSUInteger { NSDataWritingAtomic = 1 } NSDataWritingOptions;
@interface NSData : NSObject <NSCopying>
+ (instancetype)dataWithBytes:(const void *)bytes length:(NSUInteger)n;
+ (instancetype)dataWithContentsOfFile:(NSString *)path;
- (BOOL)writeToFile:(NSString *)path options:(NSDataWritingOptions)options error:(NSError **)error;
@end

@interface NSNumber : NSObject <NSCopying>
+ (NSNumber *)numberWithInt:(int)value;
+ (NSNumber *)numberWithUnsignedLong:(unsigned long)value;
@end

@interface NSArray : NSObject <NSFastEnumeration>
@property(readonly) NSUInteger count;
+ (instancetype)array;
+ (instancetype)arrayWithObjects:(const id[])objects count:(NSUInteger)n;
- (BOOL)containsObject:(id)object;
@end
@interface NSMutableArray : NSArray
- (void)addObject:(id)object;
@end

@interface NSDictionary : NSObject <NSFastEnumeration>
@property(readonly) NSUInteger count;
+ (instancetype)dictionary;
+ (instancetype)dictionaryWithObjects:(const id[])objects forKeys:(const id<NSCopying>[])keys count:(NSUInteger)n;
- (instancetype)initWithObjectsAndKeys:(id)first, ... __attribute__((sentinel(0, 1)));
- (id)objectForKey:(id)key;
@end
@interface NSMutableDictionary : NSDictionary
- (void)setObject:(id)object forKey:(id<NSCopying>)key;
@end

@interface NSError : NSObject
@property(readonly, copy) NSString *domain;
@property(readonly) NSInteger code;
@property(readonly, copy) NSString *localizedDescription;
@property(readonly, copy) NSDictionary *userInfo;
@end
extern NSString *const NSUnderlyingErrorKey;

__attribute__((objc_exception)) @interface NSException : NSObject
@property(readonly, copy) NSString *name;
@property(readonly, copy) NSString *reason;
@end

@interface NSFileManager : NSObject
@property(class, readonly, strong) NSFileManager *defaultManager;
- (BOOL)fileExistsAtPath:(NSString *)path;
- (BOOL)removeItemAtPath:(NSString *)path error:(NSError **)error;
- (BOOL)createDirectoryAtPath:(NSString *)path
    withIntermediateDirectories:(BOOL)intermediate
                     attributes:(NSDictionary *)attributes
                          error:(NSError **)error;
@end

extern Class NSClassFromString(NSString *name);
extern NSString *NSTemporaryDirectory(void);
#endif
