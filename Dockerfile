# The server in a container: on top of the base the binary, the ONNX Runtime library beside it, and an empty folder for
# the server's own files.
#
#     docker build --tag tidegate .
#     docker run --rm --publish 8000-8002:8000-8002 --volume ./models:/models:ro tidegate
#
# For NVIDIA GPUs, on a base with CUDA 13, cuDNN 9 and a C library no older than the build image's:
#
#     docker build --tag tidegate:gpu --build-arg ONNXRUNTIME_PACKAGE=onnxruntime-gpu --build-arg FEATURES=cuda \
#         --build-arg BASE_IMAGE=nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04 .
#
# FEATURES=cuda is for candle, the other package for ONNX models; CUDA_COMPUTE_CAP=75 beside it for GPUs before Ampere.
#
# KServe mounts models elsewhere and expects other ports: TIDEGATE_MODELS=/mnt/models TIDEGATE_REST=0.0.0.0:8080
# TIDEGATE_GRPC=0.0.0.0:9000. Every other setting has its variable too.
ARG BUILD_IMAGE=rust:1.95-bookworm
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${BUILD_IMAGE} AS build
WORKDIR /src
# Alone in its layers: it changes far less often than the code.
COPY deploy/setup.sh deploy/
ARG ONNXRUNTIME_PACKAGE=onnxruntime
RUN deploy/setup.sh
COPY . .
ARG FEATURES=
ARG CUDA_COMPUTE_CAP=
RUN case " $FEATURES " in *" cuda "*) with=deploy/cuda.sh ;; esac \
    && $with cargo build --release --locked --features "$FEATURES"
RUN mkdir -p /image/opt/tidegate /image/usr/local/bin /data \
    && cp target/release/tidegate .onnxruntime/*.so* /image/opt/tidegate/ \
    && strip /image/opt/tidegate/tidegate \
    && ln -s /opt/tidegate/tidegate /image/usr/local/bin/tidegate

# Nothing is run on the base, so that any base will do that has the C and C++ libraries, and /tmp when models may be
# uploaded.
FROM ${BASE_IMAGE}
COPY --from=build /image /
# A number, since not every base knows names; the first that is nobody's by convention.
COPY --from=build --chown=65532:65532 /data /var/lib/tidegate
USER 65532:65532
ENV TIDEGATE_MODELS=/models TIDEGATE_DATA=/var/lib/tidegate
WORKDIR /var/lib/tidegate
VOLUME ["/models", "/var/lib/tidegate"]
# REST, gRPC, operators.
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=60s CMD ["/opt/tidegate/tidegate", "health"]
ENTRYPOINT ["/opt/tidegate/tidegate"]
CMD ["serve"]
