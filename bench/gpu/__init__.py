"""The stages of bench/gpu.sh that are no case: sanitising, hardware counters, and whether two fronts are one."""
