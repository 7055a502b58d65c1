//! Stores that speak S3, in the process of the tests.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use s3s::{
    auth::SimpleAuth,
    service::{S3Service, S3ServiceBuilder},
};
use tokio::net::TcpListener;

const KEY: &str = "rhei-test-key";
const SECRET: &str = "rhei-test-secret";

/// A store with one access key at a time.
pub struct Store {
    address: SocketAddr,
    folder: tempfile::TempDir,
    service: Arc<Mutex<S3Service>>,
    is_read_only: Arc<AtomicBool>,
    _runtime: tokio::runtime::Runtime,
}

/// The store of all tests that need no other one.
fn store() -> &'static Store {
    static STORE: OnceLock<Store> = OnceLock::new();
    STORE.get_or_init(|| Store::start(KEY, SECRET))
}

impl Store {
    pub fn start(key: &str, secret: &str) -> Store {
        let folder = super::temp_dir();
        let service = Arc::new(Mutex::new(Self::service(&folder, key, secret)));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let (current, is_read_only) = (Arc::clone(&service), Arc::<AtomicBool>::default());
        let refuses = Arc::clone(&is_read_only);
        runtime.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (current, refuses) = (Arc::clone(&current), Arc::clone(&refuses));
                // Asked for each request: a connection is kept for long.
                let service = hyper::service::service_fn(move |mut request| {
                    let service = current.lock().unwrap().clone();
                    let writes = ["PUT", "POST"].contains(&request.method().as_str());
                    if writes && refuses.load(Ordering::Relaxed) {
                        request.headers_mut().remove("authorization");
                    }
                    async move { hyper::service::Service::call(&service, request).await }
                });
                tokio::spawn(async move {
                    let server = auto::Builder::new(TokioExecutor::new());
                    let _ = server.serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        Store { address, folder, service, is_read_only, _runtime: runtime }
    }

    fn service(folder: &tempfile::TempDir, key: &str, secret: &str) -> S3Service {
        let files = s3s_fs::FileSystem::new(folder.path()).unwrap();
        let mut service = S3ServiceBuilder::new(files);
        service.set_auth(SimpleAuth::from_single(key, secret));
        service.build()
    }

    /// From now on the store knows this access key alone.
    pub fn replace_key(&self, key: &str, secret: &str) {
        *self.service.lock().unwrap() = Self::service(&self.folder, key, secret);
    }

    /// From now on nothing is written: no file can be made in any bucket.
    pub fn refuse_writes(&self) {
        self.is_read_only.store(true, Ordering::Relaxed);
    }

    /// The address of a new bucket.
    pub fn new_bucket(&self) -> String {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("bucket-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        fs::create_dir(self.folder.path().join(&name)).unwrap();
        format!("s3://{name}/lake")
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The statement by which DuckDB finds the store.
    pub fn secret_of(&self, key: &str, secret: &str) -> String {
        format!(
            "CREATE SECRET (TYPE s3, KEY_ID '{key}', SECRET '{secret}', ENDPOINT '{}', URL_STYLE \
             'path', USE_SSL false, REGION 'us-east-1')",
            self.address
        )
    }
}

/// The address of a new bucket.
pub fn new_bucket() -> String {
    store().new_bucket()
}

/// What a process has to know of the store.
pub fn environment() -> BTreeMap<String, String> {
    [
        ("RHEI_TARGET_S3_ENDPOINT", store().endpoint()),
        ("AWS_ACCESS_KEY_ID", KEY.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", SECRET.to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

/// The statement by which DuckDB finds the store.
pub fn secret() -> String {
    store().secret_of(KEY, SECRET)
}
