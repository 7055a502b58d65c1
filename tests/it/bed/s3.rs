//! A store that speaks S3, in the process of the tests.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};

use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};
use tokio::net::TcpListener;

const KEY: &str = "rhei-test-key";
const SECRET: &str = "rhei-test-secret";

struct Store {
    address: SocketAddr,
    folder: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
}

fn store() -> &'static Store {
    static STORE: OnceLock<Store> = OnceLock::new();
    STORE.get_or_init(|| {
        let folder = super::temp_dir();
        let files = s3s_fs::FileSystem::new(folder.path()).unwrap();
        let mut service = S3ServiceBuilder::new(files);
        service.set_auth(SimpleAuth::from_single(KEY, SECRET));
        let service = service.build();

        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let service = service.clone();
                tokio::spawn(async move {
                    let server = auto::Builder::new(TokioExecutor::new());
                    let _ = server.serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        Store { address, folder, _runtime: runtime }
    })
}

/// The address of a new bucket.
pub fn new_bucket() -> String {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let name = format!("bucket-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
    fs::create_dir(store().folder.path().join(&name)).unwrap();
    format!("s3://{name}/lake")
}

/// What a process has to know of the store.
pub fn environment() -> BTreeMap<String, String> {
    [
        ("RHEI_TARGET_S3_ENDPOINT", format!("http://{}", store().address)),
        ("AWS_ACCESS_KEY_ID", KEY.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", SECRET.to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

/// The statement by which DuckDB finds the store.
pub fn secret() -> String {
    format!(
        "CREATE SECRET (TYPE s3, KEY_ID '{KEY}', SECRET '{SECRET}', ENDPOINT '{}', URL_STYLE \
         'path', USE_SSL false, REGION 'us-east-1')",
        store().address
    )
}
