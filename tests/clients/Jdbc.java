import java.math.BigDecimal;
import java.sql.*;
import java.util.*;

/** Asks a server through JDBC and prints each answer: the source and its copy have to print the same. */
public class Jdbc {
    interface Question { Object ask() throws Exception; }

    static void ask(String name, Question question) {
        try {
            System.out.println(name + ": " + question.ask());
        } catch (Exception error) {
            String message = String.valueOf(error.getMessage()).split("\n")[0];
            System.out.println(name + " FAILED: " + message);
            failed = true;
        }
    }

    static boolean failed = false;

    /** Returns the rows of a result, each column as its own type prints. */
    static List<String> rows(ResultSet result, int... columns) throws SQLException {
        List<String> rows = new ArrayList<>();
        while (result.next()) {
            StringBuilder row = new StringBuilder();
            for (int column : columns) row.append(result.getString(column)).append(' ');
            rows.add(row.toString().trim());
        }
        return rows;
    }

    public static void main(String[] arguments) throws Exception {
        TimeZone.setDefault(TimeZone.getTimeZone("UTC"));
        Connection connection = DriverManager.getConnection(arguments[0]);
        DatabaseMetaData metadata = connection.getMetaData();
        String columns = "id, b, i2, i4, i8, f4, f8, n, t, bs, d, ts, tstz, u, iv, ia, ta";

        ask("all", () -> {
            try (Statement statement = connection.createStatement();
                    ResultSet result = statement.executeQuery("SELECT " + columns + " FROM typed ORDER BY id")) {
                int[] all = new int[17];
                for (int at = 0; at < all.length; at++) all[at] = at + 1;
                return rows(result, all);
            }
        });
        // The driver turns to a server-side statement, and to binary, after some runs.
        for (int run = 0; run < 7; run++) {
            ask("prepared, run " + run, () -> {
                String sql = "SELECT id, n, tstz, ts, d, u, ia, f8, bs FROM typed WHERE i8 = ? AND n = ? AND t = ? AND d = ?";
                try (PreparedStatement statement = connection.prepareStatement(sql)) {
                    statement.setLong(1, 7_000_000_000L);
                    statement.setBigDecimal(2, new BigDecimal("12.50"));
                    statement.setString(3, "a \"b\", c");
                    statement.setObject(4, java.time.LocalDate.of(2024, 2, 29));
                    ResultSet result = statement.executeQuery();
                    result.next();
                    return result.getInt(1) + " " + result.getBigDecimal(2) + " "
                            + result.getObject(3, java.time.OffsetDateTime.class) + " " + result.getTimestamp(4) + " "
                            + result.getDate(5) + " " + result.getObject(6) + " "
                            + Arrays.toString((Object[]) result.getArray(7).getArray()) + " " + result.getDouble(8) + " "
                            + HexFormat.of().formatHex(result.getBytes(9));
                }
            });
        }
        ask("fetch size", () -> {
            connection.setAutoCommit(false);
            try (Statement statement = connection.createStatement()) {
                statement.setFetchSize(3);
                List<String> rows = rows(statement.executeQuery("SELECT id FROM typed ORDER BY id"), 1);
                connection.commit();
                return rows;
            } finally {
                connection.setAutoCommit(true);
            }
        });
        ask("array parameter", () -> {
            try (PreparedStatement statement =
                    connection.prepareStatement("SELECT id FROM typed WHERE i4 = ANY(?) ORDER BY id")) {
                statement.setArray(1, connection.createArrayOf("int4", new Integer[] {-4, 2}));
                return rows(statement.executeQuery(), 1);
            }
        });
        ask("tables", () -> rows(metadata.getTables(null, "public", "typed", new String[] {"TABLE"}), 2, 3, 4));
        ask("columns", () -> rows(metadata.getColumns(null, "public", "typed", null), 4, 5, 6, 7, 17));
        ask("primary keys", () -> rows(metadata.getPrimaryKeys(null, "public", "typed"), 4, 5, 6));
        ask("indexes", () -> rows(metadata.getIndexInfo(null, "public", "typed", false, false), 4, 6, 8, 9));
        ask("imported keys", () -> rows(metadata.getImportedKeys(null, "public", "typed"), 3));
        ask("schemas", () -> rows(metadata.getSchemas(null, "public"), 1));
        ask("timeout", () -> {
            try (Statement statement = connection.createStatement()) {
                statement.setQueryTimeout(1);
                statement.executeQuery(
                        "SELECT count(*) FROM generate_series(1, 1000000) a, generate_series(1, 1000000) b");
                return "it ended";
            } catch (SQLException error) {
                return error.getSQLState();
            }
        });
        connection.close();
        System.exit(failed ? 1 : 0);
    }
}
