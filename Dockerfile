# rhei as an image: `docker build --build-arg COMMIT="$(git rev-parse HEAD)" -t rhei .`
# How it is run: docs/install.md. scripts/dist/image-check.sh runs the steps of the last stage where Docker is not.

FROM rust:1-bookworm AS build
ARG COMMIT=unknown
ENV RHEI_COMMIT=$COMMIT
WORKDIR /src
COPY . .
RUN scripts/setup.sh build && PREFIX=/usr/local DESTDIR=/out scripts/dist.sh install

FROM debian:bookworm-slim
# The authorities that TLS to the source trusts; libduckdb needs libstdc++.
RUN apt-get update -q && \
    apt-get install -q -y --no-install-recommends ca-certificates libstdc++6 && \
    rm -rf /var/lib/apt/lists/*
RUN groupadd --system --gid 10001 rhei && \
    useradd --system --uid 10001 --gid rhei --home-dir /data --shell /usr/sbin/nologin rhei && \
    install -d -o rhei -g rhei -m 0700 /data
COPY --from=build /out/usr/local/ /usr/local/
ENV RHEI_TARGET_PATH=/data/copy.duckdb
WORKDIR /data
USER 10001:10001
VOLUME /data
EXPOSE 5439
# `rhei run` finishes its open cycle.
STOPSIGNAL SIGTERM
# Does the replicator answer? A long step of DuckDB and a source that is away are no reason to start it again, and the first start
# may wait for transactions at the source. The check asks over the socket in /data, so it is for `run`.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 CMD ["rhei", "--quiet", "status", "--running"]
ENTRYPOINT ["rhei"]
CMD ["run"]
