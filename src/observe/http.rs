//! The HTTP server: five paths, each answered from what was seen last.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{self, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use rand::RngExt;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::sleep,
};

use super::{
    export::{self, Histograms},
    status,
    watch::Watched,
};

/// Connections at the same time; others are closed at once.
const MAX_CONNECTIONS: usize = 64;
/// How long a client may take for the head of a request, and with it, how long a connection may
/// stay open between two requests.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
const MAX_HEAD_BYTES: usize = 16 << 10;

const PAGE: &str = include_str!("page.html");
/// What stands in the page for the number that its style and script have to carry.
const NONCE: &str = "{nonce}";

const TEXT: &str = "text/plain; charset=utf-8";
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What answers need.
pub struct Site {
    pub watched: Arc<Watched>,
    pub histograms: Histograms,
    /// Only names of this machine are answered to: the address is a loopback address, and a page of
    /// another site that has its own name lead here must not read what is here.
    pub is_local: bool,
}

type Answer = Response<Full<Bytes>>;

/// Accepts connections for as long as it is not dropped, which ends them.
pub async fn accept(listener: TcpListener, site: Arc<Site>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}

        let (socket, _) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // As when there are no more files: the next one may be possible in a moment.
                tracing::debug!(%error, "a connection to [observe] listen failed");
                sleep(Duration::from_millis(200)).await;
                continue;
            }
        };

        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else { continue };
        let site = Arc::clone(&site);
        connections.spawn(async move {
            serve(socket, site).await;
            drop(slot);
        });
    }
}

async fn serve(socket: TcpStream, site: Arc<Site>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let site = Arc::clone(&site);
        async move {
            let head_only = request.method() == Method::HEAD;
            let (head, _) = request.into_parts();
            // An answer takes milliseconds when there are many tables.
            let answered = tokio::task::spawn_blocking(move || answer(&site, &head)).await;
            let mut answer = answered.unwrap_or_else(|_| {
                text(StatusCode::INTERNAL_SERVER_ERROR, "this answer met a bug of rhei")
            });
            if head_only {
                *answer.body_mut() = Full::default();
            }
            Ok::<_, Infallible>(answer)
        }
    });

    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(socket), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a connection to [observe] listen broke");
    }
}

fn answer(site: &Site, request: &hyper::http::request::Parts) -> Answer {
    if request.method != Method::GET && request.method != Method::HEAD {
        let mut refused = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD are answered");
        refused.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refused;
    }

    let host = request.headers.get(header::HOST).and_then(|host| host.to_str().ok());
    if site.is_local && !host.is_some_and(is_local_name) {
        return text(
            StatusCode::MISDIRECTED_REQUEST,
            "this address answers to localhost and loopback addresses only\n(a page of another \
             site could read it otherwise; [observe] listen says where it listens)",
        );
    }

    let watched = &*site.watched;
    match request.uri.path() {
        "/" => page(),
        "/metrics" => with_type(METRICS, export::render(watched, &site.histograms)),
        "/healthz" => verdict(status::unhealthy(watched)),
        "/readyz" => verdict(status::unready(watched)),
        "/status.json" => {
            let from = request.uri.query().and_then(|query| query.strip_prefix("samples_from="));
            let from = from.and_then(|from| from.parse().ok()).unwrap_or(0);
            with_type("application/json", status::describe(watched, from).to_string())
        }
        _ => {
            text(StatusCode::NOT_FOUND, "there are /, /metrics, /healthz, /readyz and /status.json")
        }
    }
}

/// Returns whether a Host header names this machine by a name that no other site can have.
fn is_local_name(host: &str) -> bool {
    if host.parse::<SocketAddr>().is_ok_and(|address| address.ip().is_loopback()) {
        return true;
    }
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.eq_ignore_ascii_case("localhost")
        || bare.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn verdict(problem: Option<String>) -> Answer {
    match problem {
        None => text(StatusCode::OK, "ok"),
        Some(reason) => text(StatusCode::SERVICE_UNAVAILABLE, &reason),
    }
}

fn text(status: StatusCode, line: &str) -> Answer {
    let mut answer = with_type(TEXT, format!("{line}\n"));
    *answer.status_mut() = status;
    answer
}

fn with_type(content_type: &'static str, body: String) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    let headers = answer.headers_mut();
    for (name, value) in [
        (header::CONTENT_TYPE, content_type),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
    answer
}

/// Returns the status page. Only its own style and script run, and it asks only this server.
fn page() -> Answer {
    let nonce = format!("{:032x}", rand::rng().random::<u128>());
    let mut answer = with_type("text/html; charset=utf-8", PAGE.replace(NONCE, &nonce));
    let policy = format!(
        "default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src \
         'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    // The number is hexadecimal, so the header is always a valid one.
    if let Ok(policy) = HeaderValue::from_str(&policy) {
        answer.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_local_address_answers_only_to_names_that_no_other_site_can_have() {
        for host in [
            "localhost",
            "LOCALHOST:9187",
            "127.0.0.1",
            "127.0.0.1:80",
            "127.1.2.3",
            "[::1]",
            "[::1]:9187",
        ] {
            assert!(is_local_name(host), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example:9187",
            "10.0.0.1",
            "[::2]:1",
            "localhost:evil",
            "0.0.0.0:9187",
        ] {
            assert!(!is_local_name(host), "{host}");
        }
    }

    #[test]
    fn the_page_runs_only_what_carries_its_number_and_asks_nobody_else() {
        assert!(PAGE.contains("<style nonce=\"{nonce}\">"));
        assert!(PAGE.contains("<script nonce=\"{nonce}\">"));
        for word in ["http://", "https://", "src=", "url(", "@import", "style=\"", "onclick"] {
            assert!(!PAGE.contains(word), "the page holds {word}");
        }

        let [one, other] = [page(), page()].map(|answer| {
            let policy = answer.headers()[header::CONTENT_SECURITY_POLICY].to_str().unwrap();
            policy.to_owned()
        });
        assert!(one.starts_with("default-src 'none'; style-src 'nonce-"), "{one}");
        assert_ne!(one, other);
    }
}
