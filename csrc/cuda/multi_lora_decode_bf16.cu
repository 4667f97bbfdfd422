#include "multi_lora_decode_launch.cuh"

void clp::cuda::launch_bf16(const MultiLoraDecode& call, int sms, cudaStream_t stream) { launch<Bf16>(call, sms, stream); }
