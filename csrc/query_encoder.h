// The Q-Former's layers over queries alone, in one launch. Free of torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "products.h"

namespace qformer_fast {

// hidden 768, intermediate 3072 and 32 queries an image
struct QueryEncoderArguments {
  int images, tokens, layers;  // of images at most eight
  uint32_t cross_layers;       // bit i: layer i looks at the image; layer 0 does
  float eps;                   // of the LayerNorms
  int ring;                    // pages of slots in a block's shared memory; query_encoder() sets it
  void const* weights;         // (slots, 768) all blocks' and a page more, see query_encoder.cuh
  int64_t slots;
  int const* first_slots;      // (blocks + 1,) where each block's begin
  float const* norm;           // (2, 768) weight and bias of the last LayerNorm
  void const* rows;            // (32, 768) after the first self-attention
  void const* queries;         // (32, 768) what the first cross-attention asks
  void const* keys_values;     // (images, tokens, layers with cross-attention, 2, 768)
  int64_t width;               // of a token's keys and values
  void* workspace;             // query_encoder_workspace() bytes or more, aligned to 16, all ones before their first use
  int64_t workspace_bytes;     // the same at every launch with it
  void* out;                   // (images, 32, 768)
};

// ``looking``: layers with cross-attention.
int64_t query_encoder_workspace(int images, int layers, int looking);
// How many clusters of eight blocks the current device holds at once; 0 where they are too few.
int query_encoder_clusters(Dtype, int headdim);
// Launches ``clusters`` of them on the current device; returns null or what went wrong.
char const* query_encoder(Dtype, int headdim, int clusters, QueryEncoderArguments, cudaStream_t);

}  // namespace qformer_fast
