// The kernel, run on the CPU: the same C interface, with pointers of the host.
#include "kernel.cu"

alignas(128) unsigned char edgecomp_shared[kMostShared];
