//! A file that holds the password of the source and nothing else, as service managers and secret
//! stores hand it out.

use std::{
    fs::File,
    io::Read,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
};

use super::{ConfigError, Secret};

/// No password is as long as this; a file that is longer is something else.
const MAX_BYTES: u64 = 64 << 10;

/// Reads the password; one newline at its end does not belong to it.
///
/// # Errors
/// The file cannot be read or holds no password, or others can read it. As libpq has it of private
/// keys, the group may read a file that belongs to root: that is how a system credential is handed
/// to a service that runs as another user.
pub fn read_password(path: &Path) -> Result<Secret, ConfigError> {
    let refused = |reason: String| ConfigError::PasswordFile { path: path.to_owned(), reason };
    let unreadable = |error: std::io::Error| refused(format!("cannot be read: {error}"));

    let file = File::open(path).map_err(unreadable)?;
    let data = file.metadata().map_err(unreadable)?;
    if !data.is_file() {
        return Err(refused("is not a file".to_owned()));
    }

    let allowed = if data.uid() == 0 { 0o740 } else { 0o700 };
    let mode = data.permissions().mode() & 0o777;
    if mode & !allowed != 0 {
        return Err(refused(format!("can be read by others (mode {mode:04o})")));
    }

    let mut text = String::new();
    file.take(MAX_BYTES).read_to_string(&mut text).map_err(unreadable)?;
    let password = text.strip_suffix('\n').unwrap_or(&text);
    let password = password.strip_suffix('\r').unwrap_or(password);

    match password {
        "" => Err(refused("is empty".to_owned())),
        _ if password.contains(['\n', '\0']) => Err(refused("holds more than one line".to_owned())),
        _ => Ok(Secret::new(password)),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write};

    use super::*;

    /// What a file with this content and mode leads to: the password, or the error.
    fn read(content: &str, mode: u32) -> String {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content.as_bytes()).unwrap();
        fs::set_permissions(file.path(), fs::Permissions::from_mode(mode)).unwrap();
        match read_password(file.path()) {
            Ok(password) => password.expose().to_owned(),
            Err(error) => error.to_string().replace(&file.path().display().to_string(), "FILE"),
        }
    }

    #[test]
    fn the_password_is_the_file_without_its_newline() {
        for content in ["hush hush", "hush hush\n", "hush hush\r\n"] {
            assert_eq!(read(content, 0o600), "hush hush");
            assert_eq!(read(content, 0o400), "hush hush");
        }
        assert_eq!(read(" hush \n", 0o600), " hush ");
    }

    #[test]
    fn what_is_no_password_or_no_secret_is_refused_with_the_way_out() {
        let hint = "\nhint: the file holds the password alone, and only the user of rhei may read \
                    it: chmod 600 FILE";
        for (content, mode, reason) in [
            ("", 0o600, "is empty"),
            ("\n", 0o600, "is empty"),
            ("a\nb\n", 0o600, "holds more than one line"),
            ("hush", 0o644, "can be read by others (mode 0644)"),
            ("hush", 0o604, "can be read by others (mode 0604)"),
            ("hush", 0o660, "can be read by others (mode 0660)"),
        ] {
            let expected = format!("the password file FILE {reason}{hint}");
            assert_eq!(read(content, mode), expected, "{content:?}");
        }
    }

    #[test]
    fn a_group_may_read_what_belongs_to_root() {
        let is_root = fs::metadata("/proc/self").is_ok_and(|me| me.uid() == 0);
        let expected = "the password file FILE can be read by others (mode 0440)";
        let found = read("hush", 0o440);
        assert!(if is_root { found == "hush" } else { found.starts_with(expected) }, "{found}");
    }
}
