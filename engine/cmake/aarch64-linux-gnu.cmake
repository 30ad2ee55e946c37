# 64-bit ARM Linux from another machine: Debian's g++-aarch64-linux-gnu, and qemu-user-static to run the result.
#   cmake -S . -B build/aarch64 --toolchain engine/cmake/aarch64-linux-gnu.cmake -DLOWBIT_PYTHON=OFF -DLOWBIT_REPLAY=ON
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
# Static, so that running needs no ARM libraries.
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64-static)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
