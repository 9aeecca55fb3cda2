// The Python module itself. Each op registers its schema and CPU kernel in csrc/<op>_cpu.cpp
// (STABLE_TORCH_LIBRARY_FRAGMENT), so importing simclr_fast._C is all that loading takes.
#include <Python.h>

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
