// Linked in where the build is for others' machines: what the compiler's libstdc++ and glibc would
// have to be new for. It stays in this library (portable.map).
#include <new>
#include <sstream>

// A shared_ptr saves its atomics where glibc, from 2.32 on, says that there is one thread only.
// This says that there may be more.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;

#if defined(__GLIBCXX__)
namespace std {
[[noreturn]] void __throw_bad_array_new_length();  // GCC 11
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
template basic_ostringstream<char>::basic_ostringstream();  // GCC 9
template basic_stringstream<char>::basic_stringstream();
}  // namespace std
#endif
