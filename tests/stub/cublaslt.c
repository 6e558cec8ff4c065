/* cuBLASLt as far as benches/tax asks for it: column-major products of f32 on the CPU, and errors for what it would refuse. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID = 7, NOT_SUPPORTED = 15, FIRST_ALGORITHM = 40 };

typedef struct { int type; uint64_t rows, cols; int64_t ld; } Layout;
typedef struct { int compute, scale, transposed[2]; } Description;
typedef struct { uint64_t algorithm[8]; size_t workspace; int state; float waves; int reserved[4]; } Heuristic;

static int handle;

static int made(void** out, const void* value, size_t bytes) {
  *out = malloc(bytes);
  memcpy(*out, value, bytes);
  return OK;
}

int cublasLtCreate(void** out) { return *out = &handle, OK; }
size_t cublasLtGetVersion(void) { return 130101; }

int cublasLtMatmulDescCreate(void** out, int compute, int scale) {
  Description description = {compute, scale, {0, 0}};
  return compute == 68 && scale == 0 ? made(out, &description, sizeof description) : INVALID;
}

int cublasLtMatmulDescSetAttribute(Description* description, int attribute, const void* value, size_t bytes) {
  if ((attribute != 3 && attribute != 4) || bytes != sizeof(int)) return INVALID;
  memcpy(&description->transposed[attribute - 3], value, bytes);
  return OK;
}

int cublasLtMatrixLayoutCreate(void** out, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  Layout layout = {type, rows, cols, ld};
  return ld >= (int64_t)rows ? made(out, &layout, sizeof layout) : INVALID;
}

int cublasLtMatmulPreferenceCreate(void** out) {
  size_t none = 0;
  return made(out, &none, sizeof none);
}

int cublasLtMatmulPreferenceSetAttribute(size_t* preference, int attribute, const void* value, size_t bytes) {
  if (attribute != 1 || bytes != sizeof *preference) return INVALID;
  memcpy(preference, value, bytes);
  return OK;
}

/* Three results, the first of them unusable. */
int cublasLtMatmulAlgoGetHeuristic(void* of, Description* description, Layout* a, Layout* b, Layout* c, Layout* d,
                                   size_t* preference, int asked, Heuristic* results, int* returned) {
  if (of != &handle || asked < 3 || *preference == 0 || c != d || description == NULL || a == NULL || b == NULL) return INVALID;
  for (int i = 0; i < 3; ++i) {
    memset(&results[i], 0, sizeof results[i]);
    results[i].algorithm[0] = FIRST_ALGORITHM + i;
    results[i].state = i == 0 ? NOT_SUPPORTED : OK;
  }
  *returned = 3;
  return OK;
}

static float at(const float* data, const Layout* layout, int transposed, uint64_t row, uint64_t col) {
  return transposed ? data[col + row * layout->ld] : data[row + col * layout->ld];
}

int cublasLtMatmul(void* of, Description* description, const float* alpha, const float* a, Layout* la, const float* b, Layout* lb,
                   const float* beta, const float* c, Layout* lc, float* d, Layout* ld, const uint64_t* algorithm,
                   void* workspace, size_t workspace_bytes, void* stream) {
  const int *transposed = description->transposed, types = la->type | lb->type | lc->type;
  const uint64_t rows = transposed[0] ? la->cols : la->rows, depth = transposed[0] ? la->rows : la->cols;
  const uint64_t cols = transposed[1] ? lb->rows : lb->cols, depth_b = transposed[1] ? lb->cols : lb->rows;
  if (of != &handle || types != 0 || depth != depth_b || lc->rows != rows || lc->cols != cols || lc != ld || c != d) return INVALID;
  if (algorithm[0] <= FIRST_ALGORITHM || workspace == NULL || workspace_bytes == 0 || stream == NULL) return NOT_SUPPORTED;
  for (uint64_t col = 0; col < cols; ++col) {
    for (uint64_t row = 0; row < rows; ++row) {
      float sum = 0;
      for (uint64_t k = 0; k < depth; ++k) sum += at(a, la, transposed[0], row, k) * at(b, lb, transposed[1], k, col);
      float* out = d + row + col * ld->ld;
      *out = *alpha * sum + (*beta == 0 ? 0 : *beta * *out);
    }
  }
  return OK;
}
