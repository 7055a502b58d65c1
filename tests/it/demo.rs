//! `rhei demo`, as often as one likes.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use crate::bed::{Rhei, temp_dir};

const SOON: Duration = Duration::from_secs(180);

/// What a demo that was killed left behind is in nobody's way, and is gone after the next one.
#[test]
fn a_demo_reuses_the_shop_of_an_earlier_one_also_after_a_kill() {
    let folder = temp_dir();
    let (shared, cache) = (folder.path().join("tmp"), folder.path().join("cache"));
    fs::create_dir(&shared).unwrap();
    for path in [folder.path(), &shared] {
        // Under root the server is of another user.
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let rhei = Rhei::new(folder.path())
        .env("TMPDIR", &path(&shared))
        .env("XDG_CACHE_HOME", &path(&cache))
        .deadline(SOON);

    let first = rhei.run_ok(["demo", "--seconds", "1"]).stdout;
    assert!(first.contains(" rows in "), "{first}");
    assert!(first.contains(" orders at "), "the copy was not asked while it was written:\n{first}");

    let mut killed = rhei.spawn(["demo"]);
    killed.wait_for_log("publication created", SOON);
    killed.kill9();
    let left = || fs::read_dir(&shared).unwrap().count();
    assert_eq!(left(), 1, "the folder of a demo that was killed");
    // As one that was killed while it kept its shop: no process has this number.
    fs::create_dir(cache.join("rhei-demo/unfinished-4194305")).unwrap();

    let next = rhei.run_ok(["demo", "--seconds", "1"]).stdout;
    assert!(next.contains(" rows kept from an earlier demo, in "), "{next}");
    assert_eq!(next.matches("results equal").count(), 3, "{next}");
    assert_eq!(left(), 0);
}
