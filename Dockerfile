# For machines with NVIDIA GPUs:
#   docker build -t automodel .
#   docker run --gpus all --ipc=host -v "$PWD:/workspace" -v "$HOME/.cache/huggingface:/root/.cache/huggingface" -it automodel
# Any tag of pytorch/pytorch with torch >= 2.11: docker build --build-arg PYTORCH=<tag> ...
ARG PYTORCH=2.11.0-cuda12.8-cudnn9-devel
FROM pytorch/pytorch:${PYTORCH}

# The base image's torch stays: a constraint keeps pip from replacing its CUDA build.
ENV PIP_BREAK_SYSTEM_PACKAGES=1
COPY . /opt/automodel
RUN python -c "import torch; print(f'torch=={torch.__version__}')" > /tmp/torch.txt \
    && pip install --no-cache-dir -c /tmp/torch.txt "/opt/automodel[tensorboard,wandb,quantization]" \
    && rm /tmp/torch.txt

WORKDIR /workspace
CMD ["bash"]
