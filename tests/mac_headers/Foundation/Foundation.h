/* Foundation.h: the declarations of Apple's Foundation that the shim uses, from its public documentation; enough to compile
 * for macOS where no SDK is. */
#pragma once
#include <objc/NSObjCRuntime.h>
#include <objc/NSObject.h>
#include <objc/objc.h>
#include <stddef.h>
#include <stdint.h>

@class NSArray, NSDictionary, NSError, NSString;
typedef const struct __CFString *CFStringRef;
typedef const struct __CFDictionary *CFDictionaryRef;
typedef const void *CFTypeRef;
typedef struct {
    unsigned long state;
    id *itemsPtr;
    unsigned long *mutationsPtr;
    unsigned long extra[5];
} NSFastEnumerationState;

@protocol NSCopying
@end
@protocol NSFastEnumeration
- (NSUInteger)countByEnumeratingWithState:(NSFastEnumerationState *)state objects:(id[])buffer count:(NSUInteger)n;
@end

@interface NSString : NSObject <NSCopying>
+ (instancetype)stringWithUTF8String:(const char *)text;
+ (instancetype)stringWithFormat:(NSString *)format, ... __attribute__((format(__NSString__, 1, 2)));
@property(readonly) const char *UTF8String;
@property(readonly) NSUInteger length;
@property(readonly) NSString *stringByDeletingLastPathComponent;
- (BOOL)hasPrefix:(NSString *)prefix;
- (BOOL)isEqualToString:(NSString *)other;
- (NSString *)substringFromIndex:(NSUInteger)from;
- (NSArray *)componentsSeparatedByString:(NSString *)separator;
- (NSString *)stringByAppendingPathComponent:(NSString *)part;
@end
@interface NSMutableString : NSString
- (void)appendString:(NSString *)text;
- (void)appendFormat:(NSString *)format, ... __attribute__((format(__NSString__, 1, 2)));
@end

typedef enum : NSUInteger { NSDataWritingAtomic = 1 } NSDataWritingOptions;
@interface NSData : NSObject
+ (instancetype)dataWithBytes:(const void *)bytes length:(NSUInteger)n;
+ (instancetype)dataWithContentsOfFile:(NSString *)path;
- (BOOL)writeToFile:(NSString *)path options:(NSDataWritingOptions)options error:(NSError **)error;
@end
@interface NSNumber : NSObject
+ (NSNumber *)numberWithInt:(int)value;
+ (NSNumber *)numberWithUnsignedLong:(unsigned long)value;
@end

@interface NSArray : NSObject <NSFastEnumeration>
+ (instancetype)arrayWithObjects:(const id[])objects count:(NSUInteger)n;
- (BOOL)containsObject:(id)object;
@end
@interface NSMutableArray : NSArray
+ (instancetype)array;
- (void)addObject:(id)object;
@end
@interface NSDictionary : NSObject <NSFastEnumeration>
+ (instancetype)dictionaryWithObjects:(const id[])objects forKeys:(const id<NSCopying>[])keys count:(NSUInteger)n;
- (instancetype)initWithObjectsAndKeys:(id)first, ... __attribute__((sentinel(0, 1)));
- (id)objectForKey:(id)key;
@end
@interface NSMutableDictionary : NSDictionary
+ (instancetype)dictionary;
- (void)setObject:(id)object forKey:(id<NSCopying>)key;
@end

@interface NSError : NSObject
@property(readonly, copy) NSString *domain, *localizedDescription;
@property(readonly) NSInteger code;
@property(readonly, copy) NSDictionary *userInfo;
@end
extern NSString *const NSUnderlyingErrorKey;
__attribute__((__objc_exception__))
@interface NSException : NSObject
@property(readonly, copy) NSString *name, *reason;
@end

@interface NSFileManager : NSObject
@property(class, readonly) NSFileManager *defaultManager;
- (BOOL)fileExistsAtPath:(NSString *)path;
- (BOOL)removeItemAtPath:(NSString *)path error:(NSError **)error;
- (BOOL)createDirectoryAtPath:(NSString *)path
    withIntermediateDirectories:(BOOL)all
                     attributes:(NSDictionary *)attributes
                          error:(NSError **)error;
@end

extern Class NSClassFromString(NSString *name);
extern NSString *NSTemporaryDirectory(void);
