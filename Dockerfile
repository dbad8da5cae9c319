# For CPUs:  docker build -t dist-vasp .
# For CUDA:  docker build -t dist-vasp --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# Run:       docker run --rm --shm-size 2g -v "$PWD:/data" dist-vasp demo    (CUDA: --gpus all)
FROM python:3.11-slim

# torch.compile builds C++ on a CPU; DeepSpeed and Triton build C on a GPU.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=train,serve
WORKDIR /source
COPY constraints.txt ./
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple \
        -c constraints.txt torch
COPY . .
RUN pip install --no-cache-dir -c constraints.txt ".[$EXTRAS]" && cp -r examples / && rm -rf /source/*

WORKDIR /data
ENTRYPOINT ["dist-vasp"]
CMD ["--help"]
