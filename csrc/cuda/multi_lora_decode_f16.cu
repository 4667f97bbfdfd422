#include "multi_lora_decode_launch.cuh"

void clp::cuda::launch_f16(const MultiLoraDecode& call, int sms, cudaStream_t stream) { launch<F16>(call, sms, stream); }
