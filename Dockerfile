# docker build -t thunderhead .                           # PyTorch's CPU build
# docker build -t thunderhead --build-arg TORCH=cu130 .   # its CUDA build; run it with --gpus all
# docker run --rm -v "$PWD/logs:/thunderhead/logs" -v "$PWD/data:/thunderhead/data" thunderhead python train.py attention=mqa
FROM python:3.12-slim
ARG TORCH=cpu
ENV UV_TORCH_BACKEND=$TORCH
# git: records name the commit; g++: compile=auto
RUN apt-get update && apt-get install --no-install-recommends -y g++ git make && rm -rf /var/lib/apt/lists/*
WORKDIR /thunderhead
COPY . .
RUN make setup
ENV PATH=/thunderhead/.venv/bin:$PATH
CMD ["python", "train.py"]
