-- What brings a paused table back. Earlier versions looked for it in the words of the error, so the operator decides.
ALTER TABLE _rhei.tables ADD COLUMN remedy VARCHAR DEFAULT 'operator';
ALTER TABLE _rhei.tables ALTER COLUMN remedy DROP DEFAULT;
