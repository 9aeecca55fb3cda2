// The Python module simclr_fast._C_cuda: the CUDA kernels, which are loaded when a GPU needs them.
// It links neither libcudart.so nor libtorch_cuda.so, so that one binary serves torch of any CUDA:
// NVIDIA's runtime is linked statically, and torch's stream is found at run time.
#include <Python.h>

namespace {

// The -D option holds commas, so the text is made here: "sm_80,compute_120".
#define SIMCLR_TEXT_OF(...) #__VA_ARGS__
#define SIMCLR_TEXT(...) SIMCLR_TEXT_OF(__VA_ARGS__)

PyObject* architectures(PyObject*, PyObject*) {
  return PyUnicode_FromString(SIMCLR_TEXT(SIMCLR_CUDA_ARCHITECTURES));
}

PyMethodDef methods[] = {
    {"architectures", architectures, METH_NOARGS, "The GPU code in this binary."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

extern "C" PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, methods};
  return PyModule_Create(&module);
}
