"""`furiosa-mlperf`: MLPerf Inference runs of an artifact under MLCommons' LoadGen (the extra `mlperf`)."""
