/* Linked as libtorch_cuda.so where only a CPU torch is installed: it gives the linker the three
   symbols that libflatmtl_cuda.so takes from torch's CUDA library, so that the NEEDED entry is
   written. It is never loaded or shipped; on a GPU machine the name resolves to torch's own
   library. */
int aoti_torch_get_current_cuda_stream(int device, void** stream) { return !device && !stream; }
void torch_c10_cuda_check_msg(int error, const char* file, const char* function, unsigned line,
                              _Bool include_assertions, char** message) {
  (void)error, (void)file, (void)function, (void)line, (void)include_assertions, (void)message;
}
void torch_c10_cuda_free_error_msg(char* message) { (void)message; }
